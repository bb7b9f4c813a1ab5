"""The training loop of every recipe: CPU, one GPU or several through accelerate, deterministic by seed, resumable."""

import json
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from studio.checkpoints.bundled import BUNDLED, bundled_folder
from studio.errors import StudioError
from studio.processes import join
from studio.training.card import write_card
from studio.training.schedule import Rates, learning_rate_factor

SAVE_EVERY_SECONDS = 120


@dataclass(frozen=True)
class Settings:
    """What one run was asked for; stored in the run's folder and compared on resume.

    `init_from` is a bundled name, a folder, or `None` for what the recipe starts from.
    """

    recipe: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    init_from: str | None = None


def mixed_precision() -> str:
    """bf16 where the hardware multiplies it natively, else float32: emulated bf16 is far slower than float32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


def train(recipe, settings: Settings, out: Path, *, resume: bool = False, command: str = "") -> dict:
    """Run a recipe to its last step and export it.

    Args:
        recipe: the `Recipe`.
        settings: steps, pictures a step (over all processes), learning rate, seed, weights to start from.
        out: folder of the run; the exported model is `out/model`, the state to resume from `out/state`. What the recipe
            runs first, if it does, has the folder `out/first`.
        resume: go on from `out/state`; with the same settings the result equals an unbroken run's.
        command: the command line for the model card.

    Returns:
        `{"folder", "steps", "seconds", "loss", "quality"}`.

    Raises:
        StudioError: there is nothing to resume, the settings differ from the stored ones, a fresh run would overwrite a
            state, `out` cannot be written, or what the run starts from holds no such weights.
    """
    join()
    accelerator = Accelerator(mixed_precision=mixed_precision())
    if settings.batch_size % accelerator.num_processes:
        raise StudioError(f"The batch size must be a multiple of the {accelerator.num_processes} processes.")
    state_folder = _check_state(out, settings, resume)
    begun = resume and state_folder.exists()
    start, origin, earlier = settings.init_from, settings.init_from or recipe.beginning, 0.0
    with _folder_of_run(out, settings):
        if start is None and (first := recipe.first(settings.steps)):
            before = _settings_of(*first, settings.seed)
            origin = f"{before.recipe}, {before.steps} steps of {before.batch_size} before"
            if not begun:
                made = train(first[0], before, out / "first", resume=_has_state(out / "first"), command=command)
                start, earlier = made["folder"], made["seconds"]
                accelerator.wait_for_everyone()
        set_seed(settings.seed, device_specific=True)
        module = recipe.build(accelerator.device)
        if start:
            _start_from(recipe, module, start)
    optimizers = recipe.optimizers(module, settings.learning_rate)
    progress = Progress(earlier)
    wrapped, *optimizers = accelerator.prepare(module, *optimizers)
    rates = Rates(optimizers)
    accelerator.register_for_checkpointing(progress)
    if begun:
        accelerator.load_state(state_folder)

    bar = tqdm(
        total=settings.steps, initial=progress.step, unit="step", desc=recipe.name, file=sys.stderr,
        disable=not accelerator.is_main_process, mininterval=2,
    )  # fmt: skip
    wrapped.train()
    warmup = 0 if settings.init_from else recipe.defaults.warmup
    saved = time.monotonic()
    share = settings.batch_size // accelerator.num_processes
    while progress.step < settings.steps:
        started = time.monotonic()
        rates.scale(learning_rate_factor(progress.step, settings.steps, warmup, recipe.defaults.cooldown))
        rng = np.random.default_rng((settings.seed, progress.step, accelerator.process_index))
        batch = recipe.batch(rng, share, accelerator.device)
        with accelerator.autocast():
            loss = recipe.loss(wrapped, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.advance(loss.detach(), time.monotonic() - started)
        bar.update()
        if progress.step % 20 == 0:
            bar.set_postfix(loss=f"{progress.loss():.4f}", images_per_s=f"{progress.rate(settings.batch_size):.1f}")
        due = accelerator.num_processes == 1 and time.monotonic() - saved > SAVE_EVERY_SECONDS
        if due or progress.step == settings.steps or (accelerator.num_processes > 1 and progress.step % 500 == 0):
            _save_state(accelerator, out / "state")
            saved = time.monotonic()
    bar.close()
    result = {
        "folder": str(out / "model"),
        "steps": progress.step,
        "seconds": progress.seconds,
        "loss": progress.loss(),
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _export(recipe, module, out / "model")
        result["quality"] = recipe.quality(out / "model")
        write_card(recipe, settings, origin, result, command, accelerator)
    return result


class Progress:
    """Steps done, seconds spent over all resumed parts, and a running mean of the loss kept on the device.

    Args:
        seconds: spent before the first step.
    """

    def __init__(self, seconds):
        self.step, self.seconds, self.mean = 0, seconds, torch.zeros(())
        self.recent = 0.0

    def advance(self, loss, seconds):
        self.step += 1
        self.seconds += seconds
        self.recent = seconds if self.step == 1 else 0.95 * self.recent + 0.05 * seconds
        self.mean = loss if self.step == 1 else self.mean.to(loss.device).lerp(loss, max(0.02, 1 / self.step))

    def loss(self):
        return float(self.mean)

    def rate(self, batch_size):
        return batch_size / max(self.recent, 1e-9)

    def state_dict(self):
        return {"step": self.step, "seconds": self.seconds, "mean": self.loss(), "recent": self.recent}

    def load_state_dict(self, state):
        self.step, self.seconds, self.recent = state["step"], state["seconds"], state["recent"]
        self.mean = torch.tensor(state["mean"])


def _settings_of(recipe, steps, seed):
    """The settings of a run that another one begins with."""
    return Settings(recipe.name, steps, recipe.defaults.batch_size, recipe.defaults.learning_rate, seed)


@contextmanager
def _folder_of_run(out, settings):
    """The folder of a run with its settings, which vanish again when the block fails before there is more in it."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    file = out / "settings.json"
    is_new = not file.exists()
    try:
        _write(file, json.dumps(asdict(settings), indent=1))
        yield
    except BaseException:
        if is_new and not (out / "first").exists():
            with suppress(OSError):
                file.unlink()
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _write(file, text):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise StudioError(f"{file.parent} cannot be written ({error.strerror}): choose another --out.") from error


def _start_from(recipe, module, source):
    """Gives a module the weights of a bundled name or an exported folder."""
    folder = bundled_folder(source) if source in BUNDLED else Path(source)
    try:
        recipe.load(module, folder)
    except StudioError:
        raise
    except Exception as error:
        raise StudioError(
            f"{source} holds no weights of {recipe.name} to start from: give a folder that its training made."
        ) from error


def _has_state(out):
    return (out / "state").exists()


def _check_state(out, settings, resume):
    folder, stored = out / "state", out / "settings.json"
    begun = _has_state(out) or _has_state(out / "first")
    if not resume:
        if begun:
            raise StudioError(f"{out} holds an earlier run; add --resume to go on with it, or give another --out.")
        return folder
    if not begun or not stored.exists():
        raise StudioError(f"{out} holds no state to resume; start without --resume.")
    before = json.loads(stored.read_text())
    different = [key for key, value in asdict(settings).items() if before.get(key) != value]
    if different:
        raise StudioError(f"The stored run has another {', '.join(different)}; resume with the settings in {stored}.")
    return folder


def _save_state(accelerator, folder):
    partial = folder.with_name("state.part")
    accelerator.save_state(partial)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _export(recipe, module, folder):
    partial = folder.with_name("model.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    recipe.export(module.eval(), partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
