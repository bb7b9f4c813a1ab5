"""The training loop of every recipe: CPU, one GPU or several through accelerate, deterministic by seed, resumable."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list, set_seed
from diffusers.training_utils import EMAModel

from studio.checks import shown
from studio.errors import StudioError
from studio.processes import agreed, join, process_index
from studio.training.attention import PlainAttention
from studio.training.card import write_card
from studio.training.export import remove_paths
from studio.training.options import Options
from studio.training.precision import has_native_bf16, is_compiled
from studio.training.recipe import Recipe
from studio.training.report import Report
from studio.training.state import has_state, load_state, save_state, writing

SAVE_EVERY_SECONDS = 110
PAUSE = 20
"""Usual steps, at most, that a step counts as in the time of a run: a process that was paused did not train."""
REPORT_EVERY = 20
VALIDATION_BATCHES = 4
FREE_ON_RESUME = ("steps", "minutes", "sample_every", "tracker")
"""Options that may change when a run goes on."""


def train(
    make_recipe: type[Recipe],
    options: Options,
    out: Path,
    *,
    find: Callable[[str], Path],
    resume: bool = False,
    name: str = "",
    command: str = "",
) -> dict:
    """Train to the last step or minute and export.

    Args:
        make_recipe: the class of the `Recipe`.
        options: the run's.
        out: its folder: the exported model is `out/model`, what it resumes from `out/state-STEP`, samples of its
            progress `out/samples`, its losses `out/metrics.csv`.
        find: as of `Recipe`.
        resume: go on from the newest whole state; with the same options the result equals an unbroken run's.
        name: the model's name on its card.
        command: the command line for the card.

    Returns:
        `{"folder", "steps", "seconds", "loss", "validation_loss", "quality"}`, and `"skipped"`, the unreadable files
        with the reasons, where there are any.

    Raises:
        StudioError: there is nothing to resume, options differ from the stored ones, a fresh run would overwrite a
            state, `out` cannot be written, or what the run starts from holds no such weights.
    """
    join()
    _check_tracker(options.tracker)
    accelerator = Accelerator(
        mixed_precision="bf16" if has_native_bf16() else "no",
        log_with=options.tracker,
        project_dir=out if options.tracker else None,
    )
    size = options.batch_size or make_recipe.defaults.batch_size
    if size % accelerator.num_processes:
        raise StudioError(f"The batch size must be a multiple of the {accelerator.num_processes} processes.")
    size //= accelerator.num_processes
    _check_folder(out, options, resume)
    state = load_state(out) if resume else None
    with _folder_of_run(out, options, fresh=state is None):
        recipe: Recipe = make_recipe(options, accelerator.device, find)
        seed = options.seed
        set_seed(seed)
        module = recipe.build()
        if options.init_from:
            _start_from(recipe, module, find(options.init_from))
    steps = None if options.minutes else options.steps or recipe.defaults.steps
    rate = options.learning_rate or recipe.defaults.learning_rate
    warmup = _or(options.warmup, 0 if options.init_from else recipe.defaults.warmup)
    cooldown = _or(options.cooldown, recipe.defaults.cooldown)

    optimizers = recipe.optimizers(module, rate)
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    average = EMAModel(trained.values(), decay=options.average)
    progress = _Progress()
    if state is not None:
        _restore(state, module, trained, optimizers, average, progress)
    wrapped, *prepared = accelerator.prepare(module, *optimizers)
    if is_compiled(recipe, accelerator.device):
        module.compile()
    rates = Rates(optimizers)
    if options.tracker:
        accelerator.init_trackers(name or options.kind, {key: str(value) for key, value in asdict(options).items()})
    report = Report(out, name or options.kind, progress.step, steps, accelerator.is_main_process)

    def sampled(step):
        key = (seed, step, accelerator.process_index)
        recipe.share = step / steps if steps else progress.seconds / (60 * options.minutes)
        return [recipe.batch(np.random.default_rng((*key, part)), size) for part in range(options.accumulate)]

    def validated():
        with _averaged(average, trained, module):
            loss = _validation_loss(recipe, module, size, accelerator)
            torch.manual_seed(seed)
            report.sheet(progress.step, recipe.samples(module))
        report.row(step=progress.step, seconds=progress.seconds, validation_loss=loss)
        accelerator.log({"validation_loss": loss}, step=progress.step)
        return loss

    def share():
        by_time = progress.seconds / (60 * options.minutes) if options.minutes else progress.step / steps
        return broadcast_object_list([min(1.0, by_time)])[0] if accelerator.num_processes > 1 else min(1.0, by_time)

    wrapped.train()
    saved, validation_loss = time.monotonic(), None
    with ThreadPoolExecutor(max_workers=1) as ahead:
        following = ahead.submit(sampled, progress.step)
        while (done := share()) < 1:
            started = time.monotonic()
            rates.scale(factor := learning_rate_factor(progress.step, done, warmup, cooldown))
            batches, following = following.result(), ahead.submit(sampled, progress.step + 1)
            torch.manual_seed(_step_seed(seed, progress.step, accelerator.process_index))
            total = 0.0
            for batch in batches:
                batch = {key: part.to(accelerator.device, non_blocking=True) for key, part in batch.items()}
                with accelerator.autocast(), PlainAttention():
                    loss = wrapped(**batch)
                accelerator.backward(loss / len(batches))
                total = total + loss.detach() / len(batches)
            accelerator.clip_grad_norm_(trained.values(), 1.0)
            for optimizer in prepared:
                optimizer.step()
                optimizer.zero_grad()
            average.step(trained.values())
            progress.advance(total, time.monotonic() - started)
            report.bar.update()
            if progress.step % REPORT_EVERY == 0:
                speed = size * accelerator.num_processes * options.accumulate / max(progress.recent, 1e-9)
                line = {"loss": progress.loss(), "learning_rate": rate * factor, "images_per_second": speed}
                report.row(step=progress.step, seconds=progress.seconds, **line)
                left = {"minutes_left": f"{options.minutes * (1 - done):.1f}"} if options.minutes else {}
                report.bar.set_postfix(loss=f"{line['loss']:.4f}", images_per_s=f"{speed:.1f}", **left)
                accelerator.log(line, step=progress.step)
            if progress.step % options.sample_every == 0:
                validation_loss = validated()
                wrapped.train()
            if accelerator.is_main_process and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _save(out, module, trained, optimizers, average, progress)
                saved = time.monotonic()
        following.cancel()
    report.bar.close()
    if accelerator.is_main_process:
        _save(out, module, trained, optimizers, average, progress)
    if validation_loss is None or progress.step % options.sample_every:
        validation_loss = validated()
    result = {
        "folder": str(out / "model"), "steps": progress.step, "seconds": progress.seconds, "loss": progress.loss(),
        "validation_loss": validation_loss,
    }  # fmt: skip
    if recipe.source.skipped:
        result["skipped"] = [f"{file}: {reason}" for file, reason in recipe.source.skipped]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with _averaged(average, trained, module):
            _export(recipe, module, out / "model")
        result["quality"] = recipe.quality(out / "model")
        write_card(recipe, options, name or f"{options.kind} of {recipe.source.name}", result, command, accelerator)
    # Not `end_training`, which also destroys the process group: the network, still here, would be its last owner, and
    # wait with the GIL for a thread of gloo that needs the GIL. `join` leaves the group at exit.
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()  # another training may start from what process 0 has just written
    return result


class _Progress:
    """Steps done, seconds spent over all resumed parts, and a running mean of the loss kept on the device."""

    def __init__(self):
        self.step, self.seconds, self.recent, self.mean = 0, 0.0, 0.0, torch.zeros(())

    def advance(self, loss, seconds):
        if self.recent:
            seconds = min(seconds, PAUSE * self.recent)
        self.step += 1
        self.seconds += seconds
        self.recent = seconds if self.step == 1 else 0.95 * self.recent + 0.05 * seconds
        self.mean = loss if self.step == 1 else self.mean.to(loss.device).lerp(loss, max(0.02, 1 / self.step))

    def loss(self):
        return float(self.mean)


def _save(out, module, trained, optimizers, average, progress):
    model = {key: value for key, value in module.state_dict().items() if key in trained or key in _buffers(module)}
    names = {id(p): key for key, p in trained.items()}
    moments = {}
    for number, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            for what, value in state.items():
                moments[f"{number}/{what}/{names[id(p)]}"] = torch.as_tensor(value)
    tensors = {
        "model.safetensors": model,
        "average.safetensors": dict(zip(trained, average.shadow_params, strict=True)),
        "optimizers.safetensors": moments,
    }
    values = {"seconds": progress.seconds, "recent": progress.recent, "loss": progress.loss()}
    save_state(out, progress.step, tensors, {**values, "average_step": average.optimization_step})


def _restore(state, module, trained, optimizers, average, progress):
    step, tensors, values = state
    model, averages = tensors["model.safetensors"], tensors["average.safetensors"]
    if set(model) != set(trained) | _buffers(module) or set(averages) != set(trained):
        raise StudioError("The saved state is that of another network: start anew with another --out.")
    module.load_state_dict(model, strict=False)
    average.shadow_params = [averages[key].to(p) for key, p in trained.items()]
    average.optimization_step = values["average_step"]
    for key, value in tensors["optimizers.safetensors"].items():
        number, what, name = key.split("/", 2)
        p = trained[name]
        optimizers[int(number)].state[p][what] = value if what == "step" else value.to(p)
    progress.step, progress.seconds, progress.recent = step, values["seconds"], values["recent"]
    progress.mean = torch.tensor(values["loss"])


def _buffers(module):
    """Names of the buffers that belong to a module's state, without those of parts that are not trained."""
    frozen = tuple(
        f"{name}." for name, part in module.named_modules()
        if name and list(part.parameters()) and not any(p.requires_grad for p in part.parameters())
    )  # fmt: skip
    names = {name for name, _ in module.named_buffers()} & set(module.state_dict())
    return {name for name in names if not name.startswith(frozen)} if frozen else names


@contextmanager
def _averaged(average, trained, module):
    """Puts the averaged weights into a module, in evaluation mode without gradients, and back."""
    parameters = list(trained.values())
    average.store(parameters)
    average.copy_to(parameters)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        average.restore(parameters)


def _validation_loss(recipe, module, size, accelerator):
    losses = []
    for number in range(VALIDATION_BATCHES):
        torch.manual_seed(number)
        batch = recipe.batch(np.random.default_rng((2**31, number)), size, training=False)
        with accelerator.autocast():
            losses.append(float(module(**{key: part.to(accelerator.device) for key, part in batch.items()})))
    return sum(losses) / len(losses)


def _step_seed(seed, step, process):
    return int(np.random.SeedSequence((seed, step, process, 1)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _or(value, other):
    return other if value is None else value


def _check_tracker(name):
    if name is None or name in map(str, get_available_trackers()):
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise StudioError(f"There is no tracker {shown(name)}; accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    raise StudioError(f"The tracker {name} is not installed: pip install {name.replace('_', '-')}.")


def _check_folder(out, options, resume):
    stored = out / "options.json"
    if not resume:
        if has_state(out) or (out / "model").exists():
            raise StudioError(f"{out} holds an earlier run; add --resume to go on with it, or give another --out.")
        return
    if not has_state(out) or not stored.is_file():
        raise StudioError(f"{out} holds no state to resume; start without --resume.")
    try:
        before = dict(json.loads(stored.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StudioError(f"{stored} cannot be read ({error}): start anew with another --out.") from error
    now = json.loads(json.dumps(asdict(options)))
    if different := [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]:
        raise StudioError(f"The stored run has another {', '.join(different)}; resume with the options in {stored}.")


@contextmanager
def _folder_of_run(out, options, fresh):
    """The folder of a run with its options, which vanish again when the block fails in a fresh one.

    Process 0 makes and removes them for all.
    """
    is_main = process_index() == 0
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    file, partial = out / "options.json", out / "options.part"

    def write():
        try:
            out.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(options), indent=1), encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            raise StudioError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error

    try:
        agreed(write if is_main else lambda: None)
        yield
    except BaseException:
        if fresh and is_main:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
                file.unlink()
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
        raise


def _start_from(recipe, module, folder):
    try:
        recipe.load(module, folder)
    except StudioError:
        raise
    except Exception as error:
        raise StudioError(
            f"{folder} holds no weights of such a {recipe.kind} to start from: give a folder that its training made, "
            "of the same sizes."
        ) from error


def _export(recipe, module, folder):
    partial = folder.with_name("model.part")
    with writing("The model", folder, partial):
        partial.mkdir(parents=True)
        recipe.export(module, partial)
        remove_paths(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def learning_rate_factor(step: int, share: float, warmup: int, cooldown: float) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last part of a run (arXiv:2405.18392).

    Args:
        step: optimiser steps done.
        share: of the run that is done, from 0 to 1.
        warmup: steps until the peak.
        cooldown: share of the run over which the rate falls.
    """
    falling = (1 - share) / cooldown if cooldown else 1.0
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, falling))


class Rates:
    """The learning rates that optimizers start with, to be scaled together by a factor."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def scale(self, factor: float) -> None:
        """Set every rate to `factor` times what it was."""
        for optimizer, bases in zip(self.optimizers, self.bases, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
