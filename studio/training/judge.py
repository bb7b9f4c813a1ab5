"""The judge: a classifier of the emoji set that evaluations read and nothing is trained against."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from studio.data.archive import STYLES, load_concepts
from studio.data.augmentation import distort
from studio.data.backgrounds import PALETTE
from studio.data.emoji import EmojiSource
from studio.errors import StudioError
from studio.evaluation.judge import Judge, JudgeScores
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe


class TrainableJudge(nn.Module):
    """A judge with its loss."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge: Judge = judge

    def forward(
        self, images: torch.Tensor, concepts: torch.Tensor, styles: torch.Tensor, backgrounds: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the heads' cross-entropies on images (B, 3, H, W) in [-1, 1]."""
        prediction: JudgeScores = self.judge.forward(images)
        return (
            F.cross_entropy(prediction.concepts.float(), concepts, label_smoothing=0.1)
            + 0.5 * F.cross_entropy(prediction.styles.float(), styles)
            + 0.5 * F.cross_entropy(prediction.backgrounds.float(), backgrounds)
        )


class JudgeRecipe(Recipe):
    """A classifier of concept, style and background."""

    kind = "judge"
    purpose = "Names concept, style and background of an emoji; used only to measure, never to train another model."
    task = "image-classification"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=4e-3)
    takes = frozenset({"size", "dim"})

    def build(self) -> torch.nn.Module:
        size, dim = self.options.size or 128, self.options.dim or 32
        if not isinstance(self.open(size), EmojiSource):
            raise StudioError("A judge names the concepts, styles and backgrounds of the emoji set: leave out --data.")
        widths = (dim, 2 * dim, 4 * dim)
        judge = Judge(len(load_concepts()), len(STYLES), len(PALETTE), widths=widths, sample_size=size)
        return TrainableJudge(judge).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its types

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        return muon_and_adamw(module, hidden_matrices(module.judge.body), learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        examples: Any = self.source.train if training else self.source.validation
        indices = rng.integers(len(examples), size=size)
        rows = examples.rows[indices]
        images = distort(examples.images(indices.tolist()) / 2 + 0.5, PALETTE[rows[:, 2]], rng) * 2 - 1
        concepts, styles, backgrounds = torch.from_numpy(rows).unbind(1)
        return {
            "images": images.contiguous(memory_format=torch.channels_last),
            "concepts": concepts,
            "styles": styles,
            "backgrounds": backgrounds,
        }

    def load(self, module: Any, folder: Path) -> None:
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        module.judge.load_state_dict({key: value.float() for key, value in weights.items()})

    def export(self, module: Any, folder: Path) -> None:
        save_bf16(module.judge, folder)

    def quality(self, folder: Path) -> dict:
        from studio.evaluation.judge import evaluate_judge, load_judge

        return evaluate_judge(load_judge(folder))
