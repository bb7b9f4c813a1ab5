"""The convolutional encoder and decoder of latent diffusion (arXiv:2112.10752), as in VAR and RQ-VAE.

Parameters carry the names of that code: levels `down` and `up`, both numbered from fine to coarse, and `mid`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from studio.errors import StudioError
from studio.tokenizers.vq import AttentionBlock, Downsample, ResBlock, Upsample


def level_widths(base: int, multipliers: tuple[int, ...], groups: int) -> list[int]:
    """Width of each level.

    Raises:
        StudioError: a width that does not split into the groups of a GroupNorm.
    """
    widths = [base * multiplier for multiplier in multipliers]
    if any(width % groups for width in widths):
        raise StudioError(f"Every level's width must be a multiple of norm_groups={groups}; got {widths}.")
    return widths


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(
        self, width_in: int, width_out: int, blocks: int, attention: Callable[[int, int], nn.Module] | None, groups: int
    ):
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(width_in if index == 0 else width_out, width_out, groups) for index in range(blocks)
        )
        self.attn = nn.ModuleList(attention(width_out, groups) for _ in range(blocks) if attention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, attention: type[nn.Module], groups: int):
        super().__init__()
        self.block_1, self.block_2 = ResBlock(width, width, groups), ResBlock(width, width, groups)
        self.attn_1 = attention(width, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, channels, H, W) to features (B, features, h, w); each level after the first halves the grid.

    Args:
        channels, base, features: colour channels, width behind the first convolution, width of the output.
        widths: width of each level, fine to coarse.
        blocks: residual blocks a level.
        attention_levels: numbers of the levels with attention.
        attention: the class of an attention block.
    """

    def __init__(
        self,
        channels: int,
        base: int,
        widths: list[int],
        blocks: int,
        features: int,
        groups: int,
        attention_levels: tuple[int, ...],
        attention: type[nn.Module] = AttentionBlock,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        self.down, width = nn.ModuleList(), base
        for index, wanted in enumerate(widths):
            level = Level(width, wanted, blocks, attention if index in attention_levels else None, groups)
            if index + 1 < len(widths):
                level.downsample = Downsample(wanted)
            self.down.append(level)
            width = wanted
        self.mid = Middle(width, attention, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, features, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.get_submodule("downsample")(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, features, h, w) to images (B, channels, H, W).

    Arguments are those of `Encoder`; each level has one residual block more.
    """

    def __init__(
        self,
        channels: int,
        widths: list[int],
        blocks: int,
        features: int,
        groups: int,
        attention_levels: tuple[int, ...],
        attention: type[nn.Module] = AttentionBlock,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(features, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention, groups)
        levels: list[nn.Module] = []
        width = widths[-1]
        for index, wanted in reversed([*enumerate(widths)]):
            level = Level(width, wanted, blocks + 1, attention if index in attention_levels else None, groups)
            if index:
                level.upsample = Upsample(wanted)
            levels.insert(0, level)
            width = wanted
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.get_submodule("upsample")(x)
        return self.conv_out(F.silu(self.norm_out(x)))
