"""What a pipeline call returns."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput


@dataclass
class DecodingStats(BaseOutput):
    """What a call cost.

    Args:
        target_calls: calls of the transformer, and of a student, for the whole batch.
        tokens: image tokens sampled, over all images.
        mean_accepted_length: tokens of an image per call (1.0 for plain autoregressive decoding).
        seconds: wall-clock seconds by phase: "text", "prefill", "decode", "pixels", "total"; and what "decode" is made
            of, where a decoding tells: "transformer" and "head", or "target" and "draft".
        acceptance: share of the drafted tokens that were accepted, where a decoding tells.
        decoding: the name of the decoding that was taken, where the settings left that open.
        window: tokens that a call read for each image, in Jacobi decoding.
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
    """Images and the tokens they were decoded from.

    Args:
        images: a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or the tokens again.
        tokens: (B, n) int64, a grid in raster order, or a row; n is below its size only for an interrupted call, and
            where fewer were asked for. Continuous ones are (B, L, D) float32, 0 where an interrupted call did not come.
        stats: see `DecodingStats`.
        prompts: the words that each image was sampled from, what its prompt left open included; None without words.
    """

    images: Any
    tokens: torch.Tensor
    stats: DecodingStats
    prompts: list[str] | None = None
