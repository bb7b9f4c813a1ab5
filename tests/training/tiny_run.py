"""A tiny recipe, its runs, and what they leave."""

import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.training import loop
from studio.training.options import merge
from studio.training.recipe import Defaults, Recipe
from studio.training.report import read_metrics

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
