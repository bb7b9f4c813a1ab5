"""The judge: a small network that classifies concept, style and background of an image, for evaluation only.

No generator or tokenizer is trained against it, so what it says of their images stays honest. Its feature layer is
narrow enough for a Frechet distance from a few hundred images.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from studio.checkpoints.bundled import BUNDLED, bundled_folder, folder_of_model
from studio.checkpoints.loading import load_model, pick_device
from studio.checks import check_integer
from studio.data.archive import load_images
from studio.data.augmentation import distort
from studio.data.backgrounds import PALETTE, render
from studio.data.splits import combinations
from studio.errors import StudioError


@dataclass(frozen=True)
class JudgeScores:
    """Logits over concepts (B, C), styles (B, S) and backgrounds (B, G), and the features (B, D) behind them."""

    concepts: torch.Tensor
    styles: torch.Tensor
    backgrounds: torch.Tensor
    features: torch.Tensor


class Residual(nn.Module):
    """Residual block: norm, swish and 3x3 convolution, twice."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Judge(ModelMixin, ConfigMixin):
    """Convolutional classifier with three heads over one feature vector.

    Args:
        num_concepts, num_styles, num_backgrounds: classes of each head.
        widths: channels at a half, a quarter and an eighth of the resolution.
        feature_dim: length D of the feature vector.
        norm_groups: groups of every GroupNorm.
        sample_size: side in pixels at which images are read; others are resized to it.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        num_concepts: int,
        num_styles: int = 2,
        num_backgrounds: int = 10,
        widths: tuple[int, int, int] = (32, 64, 128),
        feature_dim: int = 64,
        norm_groups: int = 8,
        sample_size: int = 64,
    ):
        super().__init__()
        half, quarter, eighth = widths
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, half, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(half, quarter, 3, stride=2, padding=1),
            Residual(quarter, norm_groups),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            Residual(eighth, norm_groups),
            Residual(eighth, norm_groups),
            nn.GroupNorm(norm_groups, eighth),
            nn.SiLU(),
            nn.Conv2d(eighth, 2 * eighth, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        cells = (sample_size // 16) ** 2
        self.features = nn.Linear(2 * eighth * cells, feature_dim)
        self.feature_norm = nn.LayerNorm(feature_dim)
        self.concept_head = nn.Linear(feature_dim, num_concepts)
        self.style_head = nn.Linear(feature_dim, num_styles)
        self.background_head = nn.Linear(feature_dim, num_backgrounds)

    def forward(self, images: torch.Tensor) -> JudgeScores:
        """The scores of images (B, 3, H, W) in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise StudioError(f"The judge reads images (B, 3, H, W); got {tuple(images.shape)}.")
        side = self.config.sample_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        features = self.feature_norm(self.features(self.body(images)))
        return JudgeScores(
            self.concept_head(features), self.style_head(features), self.background_head(features), features
        )


def is_judge(name: str | Path) -> bool:
    """Whether a bundled name or a folder is a judge."""
    if name in BUNDLED:
        return BUNDLED[name].kind == "judge"
    try:
        config = json.loads((folder_of_model(name) / "config.json").read_text(encoding="utf-8"))
        return config["_class_name"] == Judge.__name__
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_judge(name: str | Path = "emoji-judge", device: str | torch.device | None = None) -> Judge:
    """Load a judge by bundled name or folder, in float32."""
    folder = bundled_folder(name) if name in BUNDLED else folder_of_model(name)
    return load_model(Judge, folder, torch.float32).to(pick_device(device))


@torch.inference_mode()
def judge_scores(judge: Judge, images: torch.Tensor, batch_size: int = 100) -> JudgeScores:
    """The scores of any number of images (n, 3, H, W) in [0, 1], float32 on the CPU."""
    device, dtype = judge.device, judge.dtype
    parts = [judge.forward((chunk * 2 - 1).to(device, dtype)) for chunk in images.split(batch_size)]
    names = ("concepts", "styles", "backgrounds", "features")
    return JudgeScores(**{name: torch.cat([getattr(part, name).float().cpu() for part in parts]) for name in names})


def scores(scored: JudgeScores, truth: np.ndarray) -> dict[str, float]:
    """Accuracies of predictions, against (concept, style, background) rows (n, 3).

    Returns:
        `{"judge_top1", "judge_top5", "style_accuracy", "background_accuracy"}`, fractions.
    """
    concepts, styles, backgrounds = torch.as_tensor(truth).unbind(1)
    best = scored.concepts.topk(5, dim=1).indices == concepts[:, None]
    return {
        "judge_top1": float(best[:, 0].float().mean()),
        "judge_top5": float(best.any(dim=1).float().mean()),
        "style_accuracy": float((scored.styles.argmax(1) == styles).float().mean()),
        "background_accuracy": float((scored.backgrounds.argmax(1) == backgrounds).float().mean()),
    }


def evaluate_judge(judge: Judge, samples: int = 1000, seed: int = 0) -> dict:
    """Accuracy of the judge on real images of held-out combinations, distorted as in its training.

    Returns:
        What `scores` returns, with `"resolution"` and `"samples"`.
    """
    rng = np.random.default_rng(seed)
    sampled = sample_combinations(samples, rng)
    originals = load_images(judge.config.sample_size)
    images = distort(render(originals, sampled), PALETTE[sampled[:, 2]], rng)
    return {
        **scores(judge_scores(judge, images), sampled),
        "resolution": judge.config.sample_size,
        "samples": samples,
    }


_held_out_features: dict[tuple[str, str], torch.Tensor] = {}


def held_out_features(judge: Judge) -> torch.Tensor:
    """Features (n, D) of the real images of all held-out combinations, computed once per process and judge."""
    weights = hashlib.sha256()
    for tensor in judge.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    key = str(judge.device), weights.hexdigest()
    if key not in _held_out_features:
        images = render(load_images(judge.config.sample_size), np.array(combinations(held_out=True)))
        _held_out_features[key] = judge_scores(judge, images).features
    return _held_out_features[key]


def sample_combinations(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct held-out (concept, style, background) rows (samples, 3), sampled with a `numpy.random.Generator`."""
    held_out = np.array(combinations(held_out=True))
    if not 1 <= check_integer("The number of samples", samples) <= len(held_out):
        raise StudioError(f"There are {len(held_out)} held-out combinations; {samples} cannot be sampled.")
    return held_out[rng.permutation(len(held_out))[:samples]]
