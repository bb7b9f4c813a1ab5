"""Pixels straight from the vectors of patches: the pixel stage of small one-dimensional tokenizers."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchPixels(nn.Module):
    """Patches side by side, then two 3x3 convolutions that see across their borders.

    The convolutions work on blocks of pixels folded into channels, half a patch a side, and add nothing before
    training.

    Args:
        channels: colours.
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
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors (B, channels * patch_size^2, h, w) to images (B, channels, h * patch_size, w * patch_size)."""
        pixels = F.pixel_shuffle(x, self.patch_size)
        folded = F.pixel_unshuffle(pixels, self.block)
        return pixels + F.pixel_shuffle(self.conv_out(F.silu(self.conv_in(folded))), self.block)
