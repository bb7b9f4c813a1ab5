"""Return values of pipelines."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

Images = list[Image.Image] | np.ndarray | torch.Tensor
"""Images as PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W), or their tokens."""


@dataclass
class DecodingStats(BaseOutput):
    """Cost of a call.

    Args:
        target_calls: calls of the transformer, and of a student, for the whole batch.
        tokens: image tokens sampled, over all images.
        mean_accepted_length: tokens of an image per call (1.0 for plain autoregressive decoding).
        seconds: wall-clock seconds by phase: "text", "prefill", "decode", "pixels", "total"; with some decodings also
            the parts of "decode": "transformer" and "head", or "target" and "draft".
        acceptance: fraction of the drafted tokens that were accepted, with decodings that draft.
        decoding: name of the decoding that was taken, where the settings leave it to `FastestExact` or a running batch
            takes plain or Jacobi decoding as it goes.
        window: tokens that a call reads for each image, in Jacobi decoding.
    """

    target_calls: int
    tokens: int
    mean_accepted_length: float
    seconds: dict[str, float]
    acceptance: float | None = None
    decoding: str | None = None
    window: int | None = None


@dataclass
class ImageTokenPipelineOutput(BaseOutput):
    """Images and their tokens.

    Args:
        images: PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or the tokens (`output_type`).
        tokens: (B, n) int64, a grid in raster order or a row; fewer than all only after an interrupted call or with
            `num_tokens`. Continuous tokens are (B, L, D) float32, 0 where an interrupted call did not sample.
        stats: see `DecodingStats`.
        prompts: the completed prompt of each image; None for classes.
        approximate: whether an edit sampled tokens without regard to known ones behind them, as in raster order.
    """

    images: Images
    tokens: torch.Tensor
    stats: DecodingStats
    prompts: list[str] | None = None
    approximate: bool = False
