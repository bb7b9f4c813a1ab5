"""Pixels from the vectors of patches: the pixel stage of small one-dimensional tokenizers."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchPixels(nn.Module):
    """Places patches side by side, then adds two 3x3 convolutions that smooth their borders.

    The convolutions work on blocks of pixels folded into channels, half a patch a side. The second starts at zero.

    Args:
        channels: colour channels.
        patch_size: side of a patch in pixels.
        width: channels between the two convolutions.
    """

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.block = patch_size if patch_size % 2 else patch_size // 2
        self.conv_in = nn.Conv2d(channels * self.block**2, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, channels * self.block**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]  # a Conv2d without bias=False has one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors (B, channels * patch_size^2, h, w) to images (B, channels, h * patch_size, w * patch_size)."""
        pixels = F.pixel_shuffle(x, self.patch_size)
        folded = F.pixel_unshuffle(pixels, self.block)
        return pixels + F.pixel_shuffle(self.conv_out(F.silu(self.conv_in(folded))), self.block)
