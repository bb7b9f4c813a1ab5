"""Two processes of the training loop take the step that one takes on all of their pictures."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from studio.processes import process_index
from studio.training import loop
from studio.training.recipe import Defaults, Recipe

STEPS, PICTURES = 4, 6


class SharedRegression(Recipe):
    """Learns the sum of three numbers; the processes take their parts of the same batches, whose losses differ much."""

    name = "shared-regression"
    data = "random numbers"
    defaults = Defaults(steps=STEPS, batch_size=PICTURES, learning_rate=0.1, warmup=0)

    def build(self, device):
        self.drawn = 0
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device)

    def optimizers(self, module, learning_rate):
        return [torch.optim.SGD(module.parameters(), learning_rate)]

    def batch(self, rng, batch_size, device):
        self.drawn += 1
        scale = torch.arange(PICTURES, dtype=torch.float32)[:, None]
        numbers = scale * torch.randn(PICTURES, 3, generator=torch.Generator().manual_seed(self.drawn))
        return {"input": numbers[process_index() * batch_size :][:batch_size].to(device)}

    def loss(self, module, batch):
        return (module(batch["input"]).squeeze(-1) - batch["input"].sum(-1)).square().mean()

    def load(self, module, folder):
        module.load_state_dict(load_file(folder / "weights.safetensors"))

    def export(self, module, folder):
        save_file(module.state_dict(), folder / "weights.safetensors")

    def quality(self, folder):
        return {"steps": self.drawn}


def train(out):
    settings = loop.Settings("shared-regression", STEPS, PICTURES, 0.1, seed=3)
    return loop.train(SharedRegression(), settings, out)


def weights(out):
    return load_file(out / "model" / "weights.safetensors")


PROGRAM = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_two_processes

test_two_processes.loop.mixed_precision = lambda: "no"
test_two_processes.train(Path("two"))
"""


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Whatever precision other trainings of this process had, which accelerate keeps."""
    AcceleratorState._reset_state()
    monkeypatch.setattr(loop, "mixed_precision", lambda: "no")
    yield
    AcceleratorState._reset_state()


def test_two_processes_step_as_one_does(tmp_path, together):
    processes = together("-c", PROGRAM, Path(__file__).parent)
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    train(tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_half_of_the_pictures_gives_another_step(tmp_path, monkeypatch):
    """The control: what one process would learn from its part alone can be told apart."""
    train(tmp_path / "one")
    monkeypatch.setattr(SharedRegression, "batch", _first_half(SharedRegression.batch))
    train(tmp_path / "half")
    one, half = weights(tmp_path / "one"), weights(tmp_path / "half")
    assert max((one[name] - half[name]).abs().max().item() for name in one) > 1e-3


def _first_half(batch):
    return lambda self, rng, size, device: batch(self, rng, size // 2, device)
