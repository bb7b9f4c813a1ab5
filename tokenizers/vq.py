"""VQ tokenizer: a convolutional autoencoder with a grid of codes from a codebook of unit vectors.

The architecture of LlamaGen's VQ-8 and VQ-16 ("Autoregressive Model Beats Diffusion", arXiv:2406.06525, section 3.1;
after VQGAN, arXiv:2012.09841). Parameters carry the authors' names. Scope: encoding and decoding; `studio.training.vq`
trains.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.errors import StudioError


class VQTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encodes images to a grid of code indices and decodes them.

    Args:
        in_channels: colour channels.
        base_channels: width of the first level.
        channel_multipliers: width of each level over `base_channels`; each level after the first halves the grid.
        encoder_res_blocks, decoder_res_blocks: residual blocks a level.
        z_channels: width at the bottleneck, before the projection to `code_dim`.
        code_dim: length of a code vector.
        codebook_size: number of codes V.
        pixel_unshuffle: side of the pixel blocks folded into channels before the first convolution (1: none).
        norm_groups: groups of every GroupNorm.
        sample_size: side in pixels that the weights were trained for.

    Raises:
        StudioError: widths that do not split into the groups, or images whose shape does not fit.
    """

    config: Any

    _no_split_modules = ["ResBlock", "AttentionBlock"]  # type: ignore[assignment]  # None in diffusers

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        encoder_res_blocks: int = 2,
        decoder_res_blocks: int = 3,
        z_channels: int = 256,
        code_dim: int = 8,
        codebook_size: int = 16384,
        pixel_unshuffle: int = 1,
        norm_groups: int = 32,
        sample_size: int = 256,
    ):
        super().__init__()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        if any(width % norm_groups for width in widths):
            raise StudioError(f"Every level's width must be a multiple of norm_groups={norm_groups}; got {widths}.")
        folded = in_channels * pixel_unshuffle**2
        self.encoder = Encoder(folded, widths, encoder_res_blocks, z_channels, norm_groups)
        self.decoder = Decoder(folded, widths, decoder_res_blocks, z_channels, norm_groups)
        self.quantize = Codebook(codebook_size, code_dim)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one token."""
        return self.config.pixel_unshuffle * 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def codebook(self) -> torch.Tensor:
        """Unit code vectors (V, code_dim)."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    @property
    def row_length(self) -> None:
        """Tokens of an image in a row; None, because these tokens are a grid."""

    @property
    def bits_per_token(self) -> float:
        """Bits of a code index, log2 V."""
        return float(torch.log2(torch.tensor(float(self.config.codebook_size))))

    def encode_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] to vectors before quantisation (B, code_dim, h, w).

        Raises:
            StudioError: images whose shape does not fit.
        """
        factor = self.downsample_factor
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise StudioError(f"Images must be (B, {self.config.in_channels}, H, W); got {tuple(images.shape)}.")
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise StudioError(f"Height and width must be multiples of {factor}; got {tuple(images.shape[-2:])}.")
        return self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.pixel_unshuffle)))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] to code indices (B, h, w), int64."""
        return self.quantize.nearest(self.encode_features(images))

    def decode_features(self, codes: torch.Tensor) -> torch.Tensor:
        """Unit code vectors (B, code_dim, h, w) to images (B, C, H, W), about [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(codes)), self.config.pixel_unshuffle)

    def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit code vectors (B, h, w, code_dim) to images (B, C, H, W), about [-1, 1]."""
        return self.decode_features(vectors.movedim(-1, 1))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Code indices (B, h, w) to images (B, C, H, W), about [-1, 1]."""
        return self.decode_features(self.quantize.lookup(tokens))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstruction of images (B, C, H, W) in [-1, 1] through their tokens."""
        return self.decode(self.encode(images))


class Codebook(nn.Module):
    """Nearest-neighbour quantiser on the unit sphere (arXiv:2110.04627, section 3.2)."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Code indices (B, h, w) of the closest unit vector to each feature (B, code_dim, h, w), found in float32."""
        codebook = F.normalize(self.embedding.weight.float(), dim=-1)
        vectors = F.normalize(features.float().movedim(1, -1), dim=-1)
        return (vectors @ codebook.T).argmax(dim=-1)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, code_dim, h, w) of code indices (B, h, w)."""
        return F.normalize(self.embedding(tokens), dim=-1).movedim(-1, 1)


class ResBlock(nn.Module):
    """Norm, swish and 3x3 convolution, twice; the shortcut is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """One head of attention over all cells of the grid, with a residual."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halves the grid: zero padding on the right and bottom, then a 3x3 convolution with stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention on the coarsest level."""

    def __init__(self, width_in: int, width_out: int, blocks: int, attention: bool, groups: int):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in if i == 0 else width_out, width_out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(width_out, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


def _middle(width: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        (ResBlock(width, width, groups), AttentionBlock(width, groups), ResBlock(width, width, groups))
    )


class Encoder(nn.Module):
    """Folded images (B, channels, H, W) to features (B, z_channels, h, w)."""

    def __init__(self, channels: int, widths: list[int], blocks: int, z_channels: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            level = Level(widths[max(i - 1, 0)], width, blocks, last, groups)
            if not last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.get_submodule("downsample")(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) to folded images (B, channels, H, W); `conv_blocks.0` is the coarsest level."""

    def __init__(self, channels: int, widths: list[int], blocks: int, z_channels: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], groups)
        self.conv_blocks = nn.ModuleList()
        coarse_first = widths[::-1]
        for i, width in enumerate(coarse_first):
            level = Level(coarse_first[max(i - 1, 0)], width, blocks, i == 0, groups)
            if i < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.get_submodule("upsample")(x)
        return self.conv_out(F.silu(self.norm_out(x)))
