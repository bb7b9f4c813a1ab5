"""The loop on a tiny recipe: decided by its seed, resumed to the same result whenever it was killed, nothing lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from safetensors.torch import load_file, save_file
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.errors import StudioError
from studio.training import loop
from studio.training.loop import learning_rate_factor
from studio.training.options import merge
from studio.training.recipe import Defaults, Recipe
from studio.training.report import read_metrics
from studio.training.state import load_state

DATA = SimpleNamespace(name="numbers", description="random numbers", checksum="0", skipped=[])


class Network(nn.Module):
    """Layers, a codebook that is averaged and revived, dropout, running statistics, and a part that stays as it is."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(3, 8), nn.Linear(8, 1), nn.Dropout(0.5)
        self.normed, self.frozen = nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.frozen.requires_grad_(False)
        self.codes = VectorQuantize(dim=8, codebook_size=5, threshold_ema_dead_code=0.5, decay=0.8)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, numbers):
        codes, _, commitment = self.codes(self.frozen(self.normed(self.first(numbers)))[:, None])
        return (self.last(self.dropout(codes[:, 0]))[:, 0] - numbers.sum(-1)).square().mean() + commitment.sum()


class Regression(Recipe):
    """Learns the sum of three numbers."""

    kind, purpose, compiles = "vq", "Adds.", False
    defaults = Defaults(steps=6, batch_size=4, learning_rate=0.1, warmup=2)
    stop_at, pause, source = None, 0, DATA

    def build(self):
        return Network().to(self.device)

    def optimizers(self, module, learning_rate):
        matrices = [module.first.weight]
        others = [p for p in module.parameters() if p.requires_grad and p is not matrices[0]]
        return [torch.optim.AdamW(matrices, learning_rate), torch.optim.SGD(others, learning_rate, momentum=0.9)]

    def batch(self, rng, size, training=True):
        self.read = getattr(self, "read", 0) + training
        if self.read == self.stop_at:
            raise KeyboardInterrupt
        time.sleep(self.pause)
        return {"numbers": torch.from_numpy(rng.random((size, 3), dtype="float32"))}

    def load(self, module, folder):
        module.load_state_dict(load_file(folder / "weights.safetensors"))

    def export(self, module, folder):
        save_file(module.state_dict(), folder / "weights.safetensors")

    def quality(self, folder):
        return {"finite": all(bool(v.isfinite().all()) for v in load_file(folder / "weights.safetensors").values())}


def train(out, *, stop_at=None, pause=0, resume=False, command="", **options):
    made = {"kind": "vq", "learning_rate": 0.1, "seed": 3, **options}
    if "minutes" not in made:
        made = {"steps": 6, **made}
    recipe = type("Stopped", (Regression,), {"stop_at": stop_at, "pause": pause})
    return loop.train(recipe, merge(made), out, find=lambda name: Path(name), resume=resume, command=command)


def weights(out):
    return load_file(out / "model" / "weights.safetensors")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def lines(out):
    """Of `metrics.csv`, what does not depend on the clock."""
    return [(row["step"], row["loss"], row["learning_rate"], row["validation_loss"]) for row in read_metrics(out)]


@pytest.fixture(autouse=True)
def saved_often(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1)
    monkeypatch.setattr(loop, "REPORT_EVERY", 1)


@pytest.fixture
def in_float32(monkeypatch):
    """Whatever precision other trainings of this process had, which accelerate keeps."""
    AcceleratorState._reset_state()
    monkeypatch.setattr(loop, "has_native_bf16", lambda: False)
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("made", [[], ["other.safetensors"], ["weights.safetensors"]], ids=str)
def test_weights_that_cannot_be_started_from_are_one_sentence_and_leave_nothing(tmp_path, made):
    source = tmp_path / "source"
    source.mkdir()
    for name in made:
        save_file({"bias": torch.zeros(2)}, source / name)
    with pytest.raises(StudioError, match="holds no weights of such a vq"):
        train(tmp_path / "runs" / "new", init_from=str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_refused(out):
    with pytest.raises(StudioError, match=f"{out} cannot be written"):
        train(Path(out))


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        train(tmp_path / name, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "average": 0.5, "sample_every": 2, "cooldown": 0.5}], ids=str
)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, options):
    """Stopped after every number of steps: weights, their average, codes, loss and `metrics.csv`."""
    whole = train(tmp_path / "whole", **options)
    per_step = options.get("accumulate", 1)
    for stop in range(2, 6):
        out = tmp_path / f"broken-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train(out, stop_at=per_step * stop + 1, **options)
        assert not (out / "model").exists() and 0 < load_state(out)[0] < 6
        result = train(out, resume=True, **options)
        assert result["steps"] == 6 and same(weights(tmp_path / "whole"), weights(out))
        assert result["loss"] == whole["loss"] and result["validation_loss"] == whole["validation_loss"]
        assert lines(out) == lines(tmp_path / "whole")


def test_no_part_of_the_state_is_superfluous(tmp_path):
    """The control: with any part of the state of step 3 left out, or the average's age, the result is another."""
    train(tmp_path / "whole", average=0.9)
    load = loop.load_state
    parts = {"optimizers.safetensors": "exp_avg", "average.safetensors": "last", "model.safetensors": "codes._codebook"}
    for file, part in {**parts, "age": None}.items():
        out = tmp_path / file
        with pytest.raises(KeyboardInterrupt):
            train(out, stop_at=5, average=0.9)

        def spoiled(folder, file=file, part=part):
            step, tensors, values = load(folder)
            if part is None:
                return step, tensors, {**values, "average_step": 0}
            for key, value in tensors[file].items():
                if part in key and value.is_floating_point():
                    value.zero_()
            return step, tensors, values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "load_state", spoiled)
            train(out, resume=True, average=0.9)
        assert not same(weights(tmp_path / "whole"), weights(out)), file


def test_lines_after_the_state_are_written_anew(tmp_path, monkeypatch):
    """The state is older than the last lines, as after most kills; a finished run that goes on adds none."""
    whole = tmp_path / "whole"
    train(whole, sample_every=2)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(out, stop_at=4, sample_every=2)
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 1e9)
    with pytest.raises(KeyboardInterrupt):
        train(out, stop_at=4, resume=True, sample_every=2)
    assert int(read_metrics(out)[-1]["step"]) > load_state(out)[0]
    for _ in range(2):
        train(out, resume=True, sample_every=2)
        assert lines(out) == lines(whole)
    assert [step for step, *_ in lines(whole)] == ["1", "2", "2", "3", "4", "4", "5", "6", "6"]


PROGRAM = """
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_loop

test_loop.loop.SAVE_EVERY_SECONDS, test_loop.loop.REPORT_EVERY = -1, 1
for line in sys.stdin:  # a child for every run, so that one start of Python does for all
    if not (child := os.fork()):
        os.setsid()
        print(os.getpid(), flush=True)
        resume = test_loop.loop.has_state(Path("run"))
        test_loop.train(Path("run"), pause=0.003, steps=40, sample_every=15, resume=resume)
        os._exit(0)
    print("killed" if os.waitpid(child, 0)[1] else "finished", flush=True)
"""


def test_killed_at_random_moments_it_comes_to_the_same_result(tmp_path):
    """SIGKILL after random times (seed 0) until a run survives: the result of an unbroken run, at least four kills."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the program: other numbers of threads round otherwise
    train(tmp_path / "whole", steps=40, sample_every=15)
    torch.set_num_threads(threads)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)], cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    rng, kills = random.Random(0), 0
    try:
        for _ in range(60):
            program.stdin.write("\n")
            program.stdin.flush()
            child = int(program.stdout.readline())
            if kills < 8:
                _wait_for_a_step(tmp_path / "run")
                time.sleep(rng.uniform(0, 0.15))
                with contextlib.suppress(ProcessLookupError):  # it has finished meanwhile
                    os.kill(child, signal.SIGKILL)
            outcome = program.stdout.readline().strip()
            kills += outcome == "killed"
            if outcome == "finished":
                break
    finally:
        program.kill()
        program.communicate()
    assert outcome == "finished" and kills >= 4
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def _wait_for_a_step(out):
    """Until something new is saved, a minute at most."""
    before, until = _states(out), time.monotonic() + 60
    while _states(out) == before and time.monotonic() < until and not (out / "model").is_dir():
        time.sleep(0.002)


def _states(out):
    return sorted(path.name for path in out.glob("state-*"))


def test_the_state_of_a_run_is_safetensors_and_json_without_paths(tmp_path):
    train(tmp_path / "run")
    files = [file for folder in (tmp_path / "run").glob("state-*") for file in folder.iterdir()]
    assert len(files) == 8 and {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes()
    names = load_file(files[0].parent / "model.safetensors")
    assert "codes._codebook.cluster_size" in names and not any(name.startswith("frozen") for name in names)


def test_the_average_of_the_weights_is_exported(tmp_path):
    """Of three steps: what the published rule of averages (diffusers, without warm-up) makes of the weights."""
    seen = []

    class Seen(Regression):
        def batch(self, rng, size, training=True):
            return super().batch(rng, size, training)

        def build(self):
            self.module = super().build()
            return self.module

        def optimizers(self, module, rate):
            made = super().optimizers(module, rate)
            made[1].register_step_post_hook(lambda *_: seen.append(module.last.weight.detach().clone()))
            return made

    options = merge({"kind": "vq", "steps": 3, "average": 0.9})
    torch.manual_seed(0)
    loop.train(Seen, options, tmp_path / "run", find=Path)
    loop.set_seed(0)
    average = Regression(options, torch.device("cpu"), Path).build().last.weight.detach()
    for step, weight in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(weights(tmp_path / "run")["last.weight"], average, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(seen[-1], average, atol=1e-4)


def test_several_batches_are_one_step(tmp_path, in_float32):
    """Without dropout and statistics, two halves give the step of the whole; one half alone, the control, does not."""

    class Plain(Regression):
        def build(self):
            module = nn.Module()
            module.layer = nn.Linear(3, 1)
            module.forward = lambda numbers: (module.layer(numbers)[:, 0] - numbers.sum(-1)).square().mean()
            return module

        def optimizers(self, module, learning_rate):
            return [torch.optim.SGD(module.parameters(), learning_rate)]

        def batch(self, rng, size, training=True):
            numbers = torch.arange(24.0).view(8, 3) / 24
            self.half = 1 - getattr(self, "half", 1)
            return {"numbers": numbers if size == 8 else numbers[4 * self.half :][:size]}

    results = {}
    for name, size, accumulate in (("whole", 8, 1), ("halves", 4, 2), ("half", 4, 1)):
        options = merge({"kind": "vq", "steps": 1, "batch_size": size, "accumulate": accumulate, "warmup": 0})
        loop.train(Plain, options, tmp_path / name, find=Path)
        results[name] = weights(tmp_path / name)["layer.weight"]
    torch.testing.assert_close(results["halves"], results["whole"])
    assert not torch.allclose(results["half"], results["whole"], atol=1e-4)


def test_minutes_end_a_run_and_more_minutes_go_on(tmp_path):
    first = train(tmp_path / "run", minutes=0.003, pause=0.01)
    assert first["steps"] >= 1 and 0.18 <= first["seconds"] < 30
    again = train(tmp_path / "run", minutes=0.003, resume=True)
    assert again["steps"] == first["steps"]
    more = train(tmp_path / "run", minutes=first["seconds"] / 60 + 0.003, resume=True)
    assert more["steps"] > first["steps"]
    with pytest.raises(StudioError, match="earlier run"):
        train(tmp_path / "run", minutes=1)


def test_card_tells_command_data_and_quality(tmp_path):
    train(tmp_path / "run", command="studio train regression")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "`studio train regression`" in card and "random numbers" in card and "| finite | True |" in card


def test_earlier_runs_are_not_overwritten_and_resume_needs_the_same_options(tmp_path):
    with pytest.raises(StudioError, match="no state"):
        train(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run")
    with pytest.raises(StudioError, match="--resume"):
        train(tmp_path / "run")
    with pytest.raises(StudioError, match="another learning_rate, seed;"):
        train(tmp_path / "run", learning_rate=0.2, seed=4, resume=True)
    (tmp_path / "run" / "options.json").write_text('{"kind":')
    with pytest.raises(StudioError, match="options.json cannot be read"):
        train(tmp_path / "run", resume=True)


def test_a_state_of_another_network_is_one_sentence(tmp_path, monkeypatch):
    train(tmp_path / "run")
    load = loop.load_state

    def of_another(out):
        step, tensors, values = load(out)
        del tensors["model.safetensors"]["last.bias"]
        return step, tensors, values

    monkeypatch.setattr(loop, "load_state", of_another)
    with pytest.raises(StudioError, match="that of another network"):
        train(tmp_path / "run", resume=True)


def test_a_full_disk_at_the_export_is_one_sentence_and_the_run_goes_on(tmp_path, full_disk, monkeypatch):
    export = Regression.export

    def large(self, module, folder):
        save_file({"large": torch.zeros(100_000)}, folder / "large.safetensors")
        export(self, module, folder)

    with monkeypatch.context() as patch, full_disk(100_000):
        patch.setattr(Regression, "export", large)
        with pytest.raises(StudioError, match="model cannot be written to .*: free some space"):
            train(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "model.part").exists()
    assert train(tmp_path / "run", resume=True)["steps"] == 6 and weights(tmp_path / "run")


def test_an_unknown_tracker_and_one_that_is_not_installed(tmp_path, monkeypatch):
    with pytest.raises(StudioError, match="no tracker 'abacus'; accelerate has .*tensorboard"):
        train(tmp_path / "run", tracker="abacus")
    monkeypatch.setattr(loop, "get_available_trackers", lambda: [])
    with pytest.raises(StudioError, match="tracker wandb is not installed: pip install wandb"):
        train(tmp_path / "run", tracker="wandb")
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_told_the_losses(tmp_path, monkeypatch):
    told = []

    class Told(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "aim", False, True

        def __init__(self, run_name, **kwargs):
            super().__init__()

        tracker = property(lambda self: self)

        def store_init_configuration(self, values):
            told.append(values["learning_rate"])

        def log(self, values, step, **kwargs):
            told.append((step, sorted(values)))

    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.AIM])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Told)
    train(tmp_path / "run", tracker="aim", steps=2)
    of_a_step = ["images_per_second", "learning_rate", "loss"]
    assert told == ["0.1", (1, of_a_step), (2, of_a_step), (2, ["validation_loss"])]


def test_learning_rate_warms_up_holds_and_falls():
    factors = [learning_rate_factor(step, step / 100, 10, 0.3) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:71] == pytest.approx([1.0] * 62) and factors[-1] == pytest.approx(1 / 30)
    assert learning_rate_factor(50, 0.99, 0, 0) == 1


def test_what_was_asked_for_is_written_down(tmp_path):
    train(tmp_path / "run", accumulate=2)
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["accumulate"] == 2 and options["steps"] == 6 and options["seed"] == 3


def test_a_pause_of_the_process_is_no_training_time():
    progress = loop._Progress()
    for seconds in (2.0, 2.0, 3600.0):
        progress.advance(torch.zeros(()), seconds)
    assert progress.seconds == 2 + 2 + loop.PAUSE * 2
    progress.advance(torch.zeros(()), 3.0)  # slower, and no pause
    assert progress.seconds == 2 + 2 + loop.PAUSE * 2 + 3
