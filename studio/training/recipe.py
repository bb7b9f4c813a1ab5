"""What a KIND must say for `studio.training.loop` to train it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from studio.data.source import Source, open_source
from studio.errors import StudioError
from studio.training.export import save_bf16
from studio.training.options import Options, checked_setting


@dataclass(frozen=True)
class Defaults:
    """A recipe's settings where the options give none.

    `steps` optimiser steps of `batch_size` images; `learning_rate` is held after `warmup` steps and falls linearly to
    zero over the last `cooldown` fraction of the run.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    cooldown: float = 0.3


class Recipe(ABC):
    """The training of one kind of model: subclasses say what is built, what a batch is and what is minimised.

    A batch is a function of the seed and the step alone, so a resumed run reads what the unbroken run would have read.

    Attributes:
        kind: its name on the command line.
        purpose: one sentence for the model card.
        defaults: where the options say nothing.
        takes: the options beyond those of the loop that change something.
        model, sampling: the settings that a `[model]` and a `[sampling]` table may give, with their defaults.
        compiles: whether a step has the same shapes each time, so that torch.compile pays on CUDA.
        compiles_on_cpu: whether it was measured to pay on a CPU with bfloat16 units too.
        library, task: what the Hub calls the library that loads the model, and what the model is for.
        source: the training data, once `build` was called.
        origin: in words, what a run starts from without `init_from`.
        share: of the run that is done when a batch is made, for what changes over a run.

    Args:
        options: of the run.
        device: where it runs.
        find: the folder of a model by bundled name, folder or name of a run beside this one.
    """

    kind: str
    purpose: str
    defaults: Defaults
    takes: frozenset[str] = frozenset()
    model: dict = {}
    sampling: dict = {}
    compiles: bool = True
    compiles_on_cpu: bool = False
    library: str = "diffusers"
    task: str = "token-based-image-generation"
    origin: str = "random weights"
    share: float = 0.0
    source: Source

    def __init__(self, options: Options, device: torch.device, find: Callable[[str], Path]):
        self.options, self.device, self.find = options, device, find
        own = {"size", "grid", "tokens", "codes", "dim", "layers", "tokenizer", "text_encoder", "target"} - self.takes
        if unused := [name for name in sorted(own) if getattr(options, name) is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise StudioError(f"{self.kind} does not take {flags}: leave that out.")
        self.model = self._merged("model", type(self).model)
        self.sampling = self._merged("sampling", type(self).sampling)

    def _merged(self, table, known):
        given = getattr(self.options, table)
        if unknown := [key for key in given if key not in known]:
            there_are = f"there are {', '.join(known)}" if known else "it has none"
            raise StudioError(f"[{table}] of {self.kind} has no {', no '.join(unknown)}; {there_are}.")
        return {**known, **{key: checked_setting(key, value, known[key]) for key, value in given.items()}}

    def open(self, size: int) -> Source:
        """The training data at a resolution."""
        self.source = open_source(self.options.data, size, crop=self.options.crop, flip=self.options.flip)
        return self.source

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The module whose parameters are trained; also opens the data and prepares caches. Called once, seeded."""

    @abstractmethod
    def optimizers(self, module: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
        """The optimizers of the module's parameters."""

    @abstractmethod
    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        """A random batch as arguments of the module, on the CPU; of validation examples unless `training`."""

    @abstractmethod
    def load(self, module: torch.nn.Module, folder: Path) -> None:
        """Start `module` from an exported folder (`--init-from`)."""

    @abstractmethod
    def export(self, module: torch.nn.Module, folder: Path) -> None:
        """Write the trained parts as bf16 safetensors, in the layout that `studio.load` reads."""

    def samples(self, module: torch.nn.Module) -> torch.Tensor | None:
        """Rows of images (rows, n, 3, H, W) in [0, 1] that show how far training is, or None."""
        return None

    @abstractmethod
    def quality(self, folder: Path) -> dict:
        """The measured quality that the model card states, from the exported files."""


class TokenizerRecipe(Recipe):
    """A recipe of an image tokenizer: the module has it as `tokenizer`."""

    shown = 8

    def samples(self, module: Any) -> torch.Tensor | None:
        images = self.source.unseen.images(range(min(self.shown, len(self.source.unseen)))).to(self.device)
        restored = module.tokenizer.decode(module.tokenizer.encode(images))
        return (torch.stack((images, restored.float())) / 2 + 0.5).clamp(0, 1)

    def images(self, rng: np.random.Generator, size: int, training: bool) -> torch.Tensor:
        """Random images (size, 3, H, W) in [-1, 1] of a batch."""
        if training:
            return self.source.augmented(rng, size)
        return self.source.unseen.images(rng.integers(len(self.source.unseen), size=size).tolist())

    def load(self, module: Any, folder: Path) -> None:
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        module.tokenizer.load_state_dict({key: value.float() for key, value in weights.items()})

    def export(self, module: Any, folder: Path) -> None:
        save_bf16(module.tokenizer, folder)

    def quality(self, folder: Path) -> dict:
        from studio.checkpoints.loading import load
        from studio.evaluation.tokenizers import evaluate_tokenizer

        return evaluate_tokenizer(load(folder, device=self.device), self.source)


def downsampling(size: int, grid: int) -> tuple[int, int]:
    """How a convolutional tokenizer gets from `size` pixels to `grid` tokens a side.

    Returns:
        Pixels a side that are folded into channels first (4 where the factor allows), and the number of halvings.

    Raises:
        StudioError: the factor is not a power of two of at least 2.
    """
    factor = size / grid
    if factor < 2 or factor != 2 ** int(np.log2(factor)):
        raise StudioError(f"--size over --grid must be 2, 4, 8, 16 or another power of two, not {size}/{grid}.")
    folded = 4 if factor >= 8 else 2 if factor >= 4 else 1
    return folded, int(np.log2(factor / folded))
