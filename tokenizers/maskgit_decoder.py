"""The convolutional decoder of MaskGIT's VQGAN (arXiv:2202.04200), the pixel stage behind TiTok and One-D-Piece.

Parameters carry the authors' names; levels `up` are numbered from fine to coarse. Where a block changes the width, its
1x1 shortcut reads the block's own output and the block's input is not added, as the weights were trained.
"""

import torch
import torch.nn.functional as F
from torch import nn

from studio.tokenizers.latent_autoencoder import level_widths


class MaskGITResBlock(nn.Module):
    """Norm, swish and 3x3 convolution without bias, twice."""

    def __init__(self, width_in: int, width_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_out, width_out, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else x)


class MaskGITLevel(nn.Module):
    """Residual blocks at one resolution; all but the finest level then double the grid."""

    def __init__(self, width_in: int, width_out: int, blocks: int, groups: int, finest: bool):
        super().__init__()
        self.block = nn.ModuleList(
            MaskGITResBlock(width_out if index else width_in, width_out, groups) for index in range(blocks)
        )
        if not finest:
            self.upsample_conv = nn.Conv2d(width_out, width_out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class MaskGITDecoder(nn.Module):
    """Features (B, features, h, w) to images (B, channels, h * f, w * f), f = 2 ** (levels - 1).

    Args:
        features, channels: channels of the input and of the images.
        base: factor of the widths.
        multipliers: width of each level over `base`, fine to coarse.
        blocks: residual blocks a level, and before the first one.
        groups: groups of every GroupNorm.

    Raises:
        StudioError: a width that does not split into the groups.
    """

    def __init__(
        self, features: int, channels: int, base: int, multipliers: tuple[int, ...], blocks: int, groups: int = 32
    ):
        super().__init__()
        widths = level_widths(base, multipliers, groups)
        self.conv_in = nn.Conv2d(features, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(MaskGITResBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.up = nn.ModuleList(
            MaskGITLevel(coarser, width, blocks, groups, finest=index == 0)
            for index, (width, coarser) in enumerate(zip(widths, (*widths[1:], widths[-1])))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for part in (*self.mid, *reversed(self.up)):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))
