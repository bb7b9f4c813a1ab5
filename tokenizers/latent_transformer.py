"""Transformers between a grid of patches and a row of latent tokens, as in TiTok (arXiv:2406.07550, section 3.2).

The encoder reads patches and learned queries together; its outputs for the queries are the latent tokens. The decoder
reads a mask token for every patch and any number of latent tokens. Pre-norm blocks, full attention, exact GELU,
learned positions. Parameters carry the authors' names.
"""

import torch
import torch.nn.functional as F
from torch import nn

from studio.errors import StudioError


class Attention(nn.Module):
    """Multi-head attention with queries, keys and values in one matrix, named as in `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        joint = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = joint.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a hidden width of four times the width."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Norm, attention, norm, MLP, with residuals; `visible` (B, 1, 1, S) is the attention mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class LatentTransformer(nn.Module):
    """Base of encoder and decoder: embeddings of class, grid and latent positions, and blocks between two norms.

    Args:
        width, layers, heads: of the blocks.
        side: patches a side of the grid.
        latents: number N of latent tokens.

    Raises:
        StudioError: a width that does not split into heads.
    """

    def __init__(self, width: int, layers: int, heads: int, side: int, latents: int):
        super().__init__()
        if width % heads:
            raise StudioError(f"The width {width} does not split into {heads} heads.")
        self.side = side
        self.class_embedding = nn.Parameter(_normal(1, width))
        self.positional_embedding = nn.Parameter(_normal(side**2 + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(_normal(latents, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def with_class(self, grid: torch.Tensor) -> torch.Tensor:
        """Class embedding and grid (B, side^2, width), with position embeddings: (B, 1 + side^2, width)."""
        first = self.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
        return torch.cat((first, grid), dim=1) + self.positional_embedding

    def blocks(self, x: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Output of the blocks for x (B, S, width)."""
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, visible)
        return x


class LatentEncoder(LatentTransformer):
    """Images to latent tokens (B, N, width); `conv_out` projects them to code vectors of length `code_dim`."""

    def __init__(self, channels: int, patch_size: int, code_dim: int, **sizes: int):
        super().__init__(**sizes)
        width = sizes["width"]
        self.patch_embed = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(width, code_dim, 1)

    def forward(self, images: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, H, W) in [0, 1] and queries (N, width) to (B, N, width)."""
        grid = self.with_class(self.patch_embed(images).flatten(2).transpose(1, 2))
        latents = (queries + self.latent_token_positional_embedding).expand(len(images), -1, -1)
        x = self.blocks(torch.cat((grid, latents.to(grid.dtype)), dim=1))
        return self.ln_post(x[:, grid.shape[1] :])


class LatentDecoder(LatentTransformer):
    """Code vectors of length `code_dim` to a grid of `features` numbers a cell."""

    def __init__(self, code_dim: int, features: int, hidden: int, **sizes: int):
        super().__init__(**sizes)
        width = sizes["width"]
        self.mask_token = nn.Parameter(_normal(1, 1, width))
        self.decoder_embed = nn.Linear(code_dim, width)
        self.ffn = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.Tanh(), nn.Conv2d(hidden, features, 1))

    def forward(self, vectors: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Features (B, features, side, side) of the grid.

        Args:
            vectors: the first n code vectors (B, n, code_dim), n up to N.
            lengths: how many of the n vectors of each image are used, (B,); all when None.
        """
        n, cells = vectors.shape[1], self.side**2
        latents = self.decoder_embed(vectors) + self.latent_token_positional_embedding[:n]
        grid = self.with_class(self.mask_token.expand(len(vectors), cells, -1))
        visible = None
        if lengths is not None:
            places = torch.arange(-1 - cells, n, device=vectors.device)
            visible = (places < lengths.to(vectors.device)[:, None])[:, None, None]
        x = self.blocks(torch.cat((grid.to(latents.dtype), latents), dim=1), visible)
        x = self.ln_post(x[:, 1 : 1 + cells])
        return self.ffn(x.transpose(1, 2).unflatten(2, (self.side, self.side)))


def _normal(*shape: int) -> torch.Tensor:
    """The authors' initialisation: Gaussian with a standard deviation of one over the root of the width."""
    return torch.randn(shape) * shape[-1] ** -0.5
