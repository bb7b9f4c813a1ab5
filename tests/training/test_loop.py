"""The loop on a tiny recipe: decided by its seed, with nothing lost and nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from safetensors.torch import load_file, save_file
from torch import nn

from studio.errors import StudioError
from studio.training import loop
from studio.training.loop import learning_rate_factor
from studio.training.options import merge
from tests.training.tiny_run import Regression, same, train, weights

pytestmark = pytest.mark.usefixtures("saved_often")


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
