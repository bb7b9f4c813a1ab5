"""RVQ tokenizer: a convolutional autoencoder with a grid of stacks of codes, coarse to fine.

RQ-VAE of "Autoregressive Image Generation using Residual Quantization" (arXiv:2203.01941): each cell of the grid is the
sum of D code vectors, and the first few of them already decode to an image. Parameters carry the authors' names.

Deviations from the authors' code: a shared codebook is stored once, the padding row of each codebook and the moving
averages of its training are not stored, and images may have any size that splits into cells.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import check_integer, shown
from studio.errors import StudioError
from studio.tokenizers.latent_autoencoder import Decoder, Encoder, level_widths
from studio.tokenizers.residual_quantizer import ResidualQuantizer


def space_to_depth(features: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Features (B, c, h * rows, w * columns) to vectors (B, h, w, rows * columns * c) of cells (rows, columns)."""
    rows, columns = cell
    blocks = features.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)


def depth_to_space(vectors: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """The inverse: vectors (B, h, w, rows * columns * c) to features (B, c, h * rows, w * columns)."""
    blocks = vectors.unflatten(3, (*cell, -1))
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class RVQTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encodes images to a grid of D code indices a cell and decodes them.

    Args:
        in_channels: colour channels.
        base_channels: width behind the first convolution.
        channel_multipliers: width of each level over `base_channels`; each level after the first halves the grid.
        res_blocks: residual blocks a level of the encoder; the decoder has one more.
        attention_levels: indices of the levels with attention, 0 the finest.
        z_channels: width at the bottleneck, before the projection to `feature_dim`.
        feature_dim: width of a feature of the encoder's grid.
        cell: rows and columns of features of one stack of codes.
        depth: levels D of codes.
        codebook_size: number of codes, one for all levels or one for each.
        shared_codebook: one codebook for all levels.
        norm_groups: groups of every GroupNorm.
        pixel_unshuffle: side of the pixel blocks folded into channels before the first convolution (1: none, as
            published).
        sample_size: side in pixels that the weights were trained for.

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    _no_split_modules = ["ResBlock", "AttentionBlock"]  # type: ignore[assignment]  # None in diffusers

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
        res_blocks: int = 2,
        attention_levels: tuple[int, ...] = (5,),
        z_channels: int = 256,
        feature_dim: int = 256,
        cell: tuple[int, int] = (1, 1),
        depth: int = 4,
        codebook_size: int | tuple[int, ...] = 16384,
        shared_codebook: bool = True,
        norm_groups: int = 32,
        pixel_unshuffle: int = 1,
        sample_size: int = 256,
    ):
        super().__init__()
        sizes = (codebook_size,) * depth if isinstance(codebook_size, int) else tuple(codebook_size)
        if len(sizes) != depth or depth < 1:
            raise StudioError(f"{depth} levels need one codebook size or {depth} of them; got {shown(codebook_size)}.")
        widths = level_widths(base_channels, channel_multipliers, norm_groups)
        network = (widths, res_blocks, z_channels, norm_groups, tuple(attention_levels))
        folded = in_channels * pixel_unshuffle**2
        self.encoder = Encoder(folded, base_channels, *network)
        self.decoder = Decoder(folded, *network)
        self.quantizer = ResidualQuantizer(sizes, feature_dim * math.prod(cell), shared_codebook)
        self.quant_conv = nn.Conv2d(z_channels, feature_dim, 1)
        self.post_quant_conv = nn.Conv2d(feature_dim, z_channels, 1)

    @property
    def pixels_per_cell(self) -> tuple[int, int]:
        """Rows and columns of pixels of one cell."""
        factor = self.config.pixel_unshuffle * 2 ** (len(self.config.channel_multipliers) - 1)
        rows, columns = self.config.cell
        return rows * factor, columns * factor

    @property
    def codebooks(self) -> list[torch.Tensor]:
        """Code vectors (K_d, C) of each level, coarse to fine."""
        return self.quantizer.tables

    @property
    def bits_per_token(self) -> float:
        """Bits of a code index, log2 K, averaged over the levels."""
        return self.bits_of_stack(self.config.depth) / self.config.depth

    def bits_of_stack(self, depth: int) -> float:
        """Bits of the codes of a cell at its first `depth` levels."""
        return sum(math.log2(len(self.codebooks[level])) for level in range(depth))

    def encode_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, H, W) in [-1, 1] to vectors before quantisation (B, h, w, C).

        Raises:
            StudioError: images of another shape, or sides that do not split into cells.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise StudioError(f"Images must be (B, {self.config.in_channels}, H, W); got {tuple(images.shape)}.")
        rows, columns = self.pixels_per_cell
        if images.shape[2] % rows or images.shape[3] % columns:
            raise StudioError(
                f"Height and width must be multiples of {rows} and {columns}; got {tuple(images.shape[2:])}."
            )
        folded = F.pixel_unshuffle(images, self.config.pixel_unshuffle)
        return space_to_depth(self.quant_conv(self.encoder(folded)), self.config.cell)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, H, W) in [-1, 1] to code indices (B, h, w, D), int64, coarse to fine."""
        return self.quantizer.encode(self.encode_features(images))

    def decode_features(self, vectors: torch.Tensor) -> torch.Tensor:
        """Sums of code vectors (B, h, w, C) to images (B, channels, H, W), about [-1, 1]."""
        folded = self.decoder(self.post_quant_conv(depth_to_space(vectors, self.config.cell)))
        return F.pixel_shuffle(folded, self.config.pixel_unshuffle)

    def decode(self, tokens: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """Decodes to images (B, channels, H, W), about [-1, 1].

        Args:
            tokens: code indices (B, h, w, d) of the first d levels; a code of -1 adds nothing.
            depth: how many of these levels are used; all when None.

        Raises:
            StudioError: more levels than there are.
        """
        if depth is not None:
            depth = check_integer("depth", depth, 1, tokens.shape[-1])
        return self.decode_features(self.quantizer.lookup(tokens[..., :depth]).sum(dim=-2))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For training: reconstruction of images (B, channels, H, W) in [-1, 1], and the commitment loss.

        Gradients pass the quantiser straight-through; codebooks get none.
        """
        quantized = self.quantizer(self.encode_features(images))
        return self.decode_features(quantized.vectors), quantized.commitment
