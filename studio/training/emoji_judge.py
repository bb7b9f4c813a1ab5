"""Recipe of `emoji-judge`."""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from studio.data.archive import STYLES, load_concepts, load_pictures
from studio.data.augmentation import distort
from studio.data.backgrounds import PALETTE, render
from studio.data.splits import combinations
from studio.evaluation.judge import Judge
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe


class TrainableJudge(nn.Module):
    """A judge with its loss."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge

    def forward(self, images, concepts, styles, backgrounds):
        """Sum of the heads' cross-entropies on pictures (B, 3, H, W) in [-1, 1]."""
        verdict = self.judge(images)
        return (
            F.cross_entropy(verdict.concepts.float(), concepts, label_smoothing=0.1)
            + 0.5 * F.cross_entropy(verdict.styles.float(), styles)
            + 0.5 * F.cross_entropy(verdict.backgrounds.float(), backgrounds)
        )


class EmojiJudge(Recipe):
    """Names concept, style and background of a picture; used only to measure, never to train another model."""

    name = "emoji-judge"
    data = "Fluent Emoji, without the combinations held out for generators; moved, blurred, brightened, with noise"
    defaults = Defaults(steps=1600, batch_size=64, learning_rate=4e-3)

    def build(self, device):
        judge = Judge(len(load_concepts()), len(STYLES), len(PALETTE))
        self.pictures = load_pictures(judge.config.sample_size)
        self.combinations = np.array(combinations(held_out=False))
        return TrainableJudge(judge).to(device, memory_format=torch.channels_last)

    def optimizers(self, module, learning_rate):
        return muon_and_adamw(module, hidden_matrices(module.judge.body), learning_rate)

    def batch(self, rng, batch_size, device):
        drawn = self.combinations[rng.integers(len(self.combinations), size=batch_size)]
        images = distort(render(self.pictures, drawn), PALETTE[drawn[:, 2]], rng)
        concepts, styles, backgrounds = torch.from_numpy(drawn).to(device).unbind(1)
        return {
            "images": (images * 2 - 1).to(device, memory_format=torch.channels_last),
            "concepts": concepts,
            "styles": styles,
            "backgrounds": backgrounds,
        }

    def load(self, module, folder):
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        module.judge.load_state_dict({key: value.float() for key, value in weights.items()})

    def export(self, module, folder):
        save_bf16(module.judge, folder)

    def quality(self, folder):
        from studio.evaluation.judge import evaluate_judge, load_judge

        return evaluate_judge(load_judge(folder))
