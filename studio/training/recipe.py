"""What a recipe must say for `studio.training.loop` to train it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Defaults:
    """A recipe's settings where the caller gives none.

    `steps` optimiser steps of `batch_size` pictures; `learning_rate` is held after `warmup` steps and falls linearly to
    zero over the last `cooldown` fraction of the steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    cooldown: float = 0.3


class Recipe(ABC):
    """One bundled model's training: subclasses say what is built, what is drawn and what is lost.

    A batch is a function of the seed and the step alone, so a resumed run draws what the unbroken run would have drawn.
    `library` and `task` are what the Hub calls the library that loads the model, and what it is for; `beginning` says
    in words what a run starts from when nothing else is given.
    """

    name: str
    data: str
    defaults: Defaults
    library: str = "diffusers"
    task: str = "token-based-image-generation"
    beginning: str = "random weights"

    @abstractmethod
    def build(self, device: torch.device) -> torch.nn.Module:
        """The module whose parameters are trained; also prepares caches. Called once, after seeding."""

    def first(self, steps: int) -> "tuple[Recipe, int] | None":
        """A recipe, and for how many steps, that makes what a run of `steps` without `--init-from` starts from."""
        return None

    def optimizers(self, module: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
        """AdamW with decay on matrices only, unless a recipe knows better."""
        matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))]

    @abstractmethod
    def batch(self, rng, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
        """One batch drawn with a `numpy.random.Generator`."""

    def loss(self, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scalar to minimise; called through the (possibly distributed) module."""
        return module(**batch)

    @abstractmethod
    def load(self, module: torch.nn.Module, folder: Path) -> None:
        """Start `module` from an exported folder (`--init-from`)."""

    @abstractmethod
    def export(self, module: torch.nn.Module, folder: Path) -> None:
        """Write the trained parts as bf16 safetensors, in the layout that `studio.load` reads."""

    @abstractmethod
    def quality(self, folder: Path) -> dict:
        """The measured quality that the model card states, from the exported files."""
