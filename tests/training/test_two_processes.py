"""Two processes of the training loop take the step that one takes on all of their images."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from studio.errors import StudioError
from studio.processes import process_index
from studio.training import loop
from studio.training.options import merge
from studio.training.recipe import Defaults, Recipe
from studio.training.report import read_metrics
from tests.two_processes import outputs

STEPS, IMAGES = 4, 6


class Sum(nn.Module):
    """Learns the sum of three numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, numbers):
        return (self.layers(numbers).squeeze(-1) - numbers.sum(-1)).square().mean()


class SharedRegression(Recipe):
    """The processes take their parts of the same batches, whose losses differ much."""

    kind, purpose, compiles = "vq", "Adds.", False
    defaults = Defaults(steps=STEPS, batch_size=IMAGES, learning_rate=0.1, warmup=0)
    source = SimpleNamespace(name="numbers", description="random numbers", checksum="0", skipped=[])

    def build(self):
        self.sampled = 0
        return Sum().to(self.device)

    def optimizers(self, module, learning_rate):
        return [torch.optim.SGD(module.parameters(), learning_rate)]

    def batch(self, rng, size, training=True):
        self.sampled += training
        scale = torch.arange(IMAGES, dtype=torch.float32)[:, None]
        numbers = scale * torch.randn(IMAGES, 3, generator=torch.Generator().manual_seed(self.sampled))
        return {"numbers": numbers[process_index() * size :][:size]}

    def load(self, module, folder):
        module.load_state_dict(load_file(folder / "weights.safetensors"))

    def export(self, module, folder):
        save_file(module.state_dict(), folder / "weights.safetensors")

    def quality(self, folder):
        return {"seen": self.sampled}


def train(out, **options):
    asked = merge({"kind": "vq", "seed": 3, "average": 0.5, "sample_every": 2, **options})
    return loop.train(SharedRegression, asked, out, find=Path)


def weights(out):
    return load_file(out / "model" / "weights.safetensors")


PROGRAM = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_two_processes

test_two_processes.loop.has_native_bf16 = lambda: False
try:
    test_two_processes.train(Path("odd"), batch_size=3)
except test_two_processes.StudioError as error:
    assert "multiple of the 2 processes" in str(error), error
assert not Path("odd").exists()
test_two_processes.train(Path("two"))
test_two_processes.train(Path("next"), init_from="two/model")
"""


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Whatever precision other trainings of this process had, which accelerate keeps."""
    AcceleratorState._reset_state()
    monkeypatch.setattr(loop, "has_native_bf16", lambda: False)
    yield
    AcceleratorState._reset_state()


def test_two_processes_step_as_one_does(tmp_path, together):
    """They also write one set of lines, refuse a batch that cannot be shared before anything is written, and go on
    with another training, which starts from the first one's weights.
    """
    processes = together("-c", PROGRAM, Path(__file__).parent)
    for process, (_, errors) in zip(processes, outputs(processes)):
        assert process.returncode == 0, errors
    train(tmp_path / "one")
    train(tmp_path / "following", init_from=str(tmp_path / "one" / "model"))
    for alone, shared in (("one", "two"), ("following", "next")):
        one, two = weights(tmp_path / alone), weights(tmp_path / shared)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    assert [row["step"] for row in read_metrics(tmp_path / "two")] == ["2", "4"]


def test_half_of_the_images_gives_another_step(tmp_path, monkeypatch):
    """The control: what one process would learn from its part alone can be told apart."""
    train(tmp_path / "one")
    batch = SharedRegression.batch
    monkeypatch.setattr(SharedRegression, "batch", lambda self, rng, size, training=True: batch(self, rng, size // 2))
    train(tmp_path / "half")
    one, half = weights(tmp_path / "one"), weights(tmp_path / "half")
    assert max((one[name] - half[name]).abs().max().item() for name in one) > 1e-3


def test_one_process_takes_any_batch(tmp_path):
    assert train(tmp_path / "run", batch_size=3)["steps"] == STEPS
    with pytest.raises(StudioError, match="earlier run"):
        train(tmp_path / "run", batch_size=3)
