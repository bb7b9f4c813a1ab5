"""VAR's tokenizer: an image as code grids of increasing size, each of which refines the sum of those before.

"Visual Autoregressive Modeling" (arXiv:2404.02905), algorithms 1 and 2. The features of an image are the sum over
scales of phi_k(upsampled code vectors); phi is half the identity and half a 3x3 convolution, and neighbouring scales
share one. Codes are not normalised. Parameters carry the authors' names. Tokens of all scales are one sequence, coarse
to fine, each scale in raster order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.tokenizers.latent_autoencoder import Decoder, Encoder, level_widths


class VARTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encodes images to code indices of all scales and decodes them.

    Args:
        base_channels, channel_multipliers, res_blocks: as in VQGAN; each level after the first halves the grid.
        code_dim, codebook_size: width C and number V of code vectors.
        scales: side of the grid at each scale; the last is the grid of the features.
        phis: number of shared convolutions.
        phi_share: weight of the convolution in phi; that of the identity is the rest.
        norm_groups: groups of every GroupNorm.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        base_channels: int = 160,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        code_dim: int = 32,
        codebook_size: int = 4096,
        scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phis: int = 4,
        phi_share: float = 0.5,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = level_widths(base_channels, channel_multipliers, norm_groups)
        sizes = (widths, res_blocks, code_dim, norm_groups, (len(widths) - 1,), AttentionBlock)
        self.encoder = Encoder(3, base_channels, *sizes)
        self.decoder = Decoder(3, *sizes)
        self.quantize = MultiScaleCodebook(codebook_size, code_dim, phis, phi_share)
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)

    @property
    def codebook(self) -> torch.Tensor:
        """Code vectors (V, code_dim), not normalised."""
        return self.quantize.embedding.weight

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to code indices (B, n), int64."""
        return self.encode_features(self.quant_conv(self.encoder(images)))

    def encode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, C, h, w) to code indices (B, n): the nearest codes of the residual, scale by scale."""
        rest, found = features, []
        for step, side in enumerate(self.config.scales):
            shrunk = F.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1).flatten(1, 2)
            distance = self.codebook.square().sum(dim=-1) - 2 * shrunk @ self.codebook.T
            found.append(distance.argmin(dim=-1))
            rest = rest - self.correction(self.codebook[found[-1]], step)
        return torch.cat(found, dim=1)

    def correction(self, vectors: torch.Tensor, step: int) -> torch.Tensor:
        """The contribution (B, C, h, w) of the code vectors (B, side^2, C) of one scale to the features."""
        side, last = self.config.scales[step], self.config.scales[-1]
        grid = vectors.transpose(1, 2).unflatten(2, (side, side))
        if side != last:
            grid = F.interpolate(grid, size=(last, last), mode="bicubic")
        return self.quantize.phi(step, len(self.config.scales))(grid)

    def features(self, vectors: torch.Tensor) -> torch.Tensor:
        """Features (B, C, h, w) of code vectors (B, n, C) of all scales, or of the first of them."""
        return self._sums(vectors)[-1]

    def inputs(self, vectors: torch.Tensor) -> torch.Tensor:
        """The inputs of VAR at scales 1 and up: the features so far, resized to each next scale, (B, m, C).

        Args:
            vectors: code vectors (B, n, C) of the scales before.
        """
        scales = self.config.scales
        shrunk = [
            F.interpolate(features, size=(side, side), mode="area").flatten(2).transpose(1, 2)
            for features, side in zip(self._sums(vectors), scales[1:])
        ]
        return torch.cat(shrunk, dim=1) if shrunk else vectors[:, :0]

    def _sums(self, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Features after each scale of the vectors."""
        sums: list[torch.Tensor] = []
        start = 0
        for step, side in enumerate(self.config.scales):
            if start == vectors.shape[1]:
                break
            added = self.correction(vectors[:, start : start + side * side], step)
            sums.append(sums[-1] + added if sums else added)
            start += side * side
        return sums

    def decode_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""
        return self.decoder(self.post_quant_conv(features)).clamp(-1, 1)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Code indices (B, n) to images (B, 3, H, W) in [-1, 1]."""
        return self.decode_features(self.features(self.codebook[tokens]))


class MultiScaleCodebook(nn.Module):
    """The code vectors, and the convolutions shared by scales."""

    def __init__(self, codebook_size: int, code_dim: int, phis: int, phi_share: float):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        self.quant_resi = SharedPhis(code_dim, phis, phi_share)

    def phi(self, step: int, steps: int) -> "Phi":
        """The convolution of a scale: the one whose position on the line from 0 to 1 is nearest."""
        layers = self.quant_resi.qresi_ls
        share = 3 if len(layers) == 4 else 2
        edge = 1 / (share * len(layers))
        places = torch.linspace(edge, 1 - edge, len(layers), dtype=torch.float64)
        nearest = layers[int((places - step / max(1, steps - 1)).abs().argmin())]
        assert isinstance(nearest, Phi)
        return nearest


class SharedPhis(nn.Module):
    """The list of convolutions, with the authors' parameter names."""

    def __init__(self, code_dim: int, phis: int, phi_share: float):
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(code_dim, phi_share) for _ in range(phis))


class Phi(nn.Conv2d):
    """A 3x3 convolution mixed with its input."""

    def __init__(self, width: int, share: float):
        super().__init__(width, width, 3, padding=1)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 - self.share) * x + self.share * super().forward(x)


class AttentionBlock(nn.Module):
    """One head of attention over all cells of the grid, with one fused projection and a residual."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)
