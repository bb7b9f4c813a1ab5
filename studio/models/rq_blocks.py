"""What the two transformers of RQ-Transformer (arXiv:2203.01941) are made of, under the authors' parameter names."""

import torch
import torch.nn.functional as F
from torch import nn

from studio.models.kv_cache import KVCache


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.key, self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, layer: int) -> torch.Tensor:
        """x (rows, n, dim), behind what the cache holds; without a mask, causal."""
        queries, keys, values = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if cache is not None:
            mask = cache.attention_mask(x.shape[1]) if mask is None else mask
            keys, values = cache.update(layer, torch.stack((keys, values), dim=1))
        is_causal = mask is None and cache is None
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, num_heads: int, activation: str, dropout: float):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        nonlinear = nn.GELU() if activation == "gelu" else QuickGELU()
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nonlinear, nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, cache, layer):
        x = x + self.dropout(self.attn(self.ln1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.ln2(x)))


class Stack(nn.Module):
    """Blocks without a norm behind them."""

    def __init__(self, layers: int, *sizes):
        super().__init__()
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """x (rows, n, dim), behind what the cache holds.

        `mask` (rows, 1, n, n) is true where a position of x sees another one; each sees itself and those before it when
        None.
        """
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return x


class LevelEmbedding(nn.Module):
    """One table of tokens for each level, in one weight (sum of sizes, dim)."""

    def __init__(self, sizes: tuple[int, ...], dim: int):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes), dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., d, dim) of tokens (..., d) of the first d levels."""
        starts = torch.tensor((0, *self.sizes), device=tokens.device).cumsum(dim=0)[: tokens.shape[-1]]
        return F.embedding(tokens + starts, self.weight)


class LevelLinear(nn.Module):
    """One linear layer for each level, weight (D, dim, V)."""

    def __init__(self, depth: int, dim: int, vocab: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(depth, dim, vocab)), nn.Parameter(torch.zeros(depth, vocab))

    def forward(self, states: torch.Tensor, level: int | None = None) -> torch.Tensor:
        """(..., D, dim) to (..., D, V), or, for one level, (..., dim) to (..., V)."""
        if level is not None:
            return states @ self.weight[level] + self.bias[level]
        return torch.einsum("...di,dio->...do", states, self.weight) + self.bias


class Classifier(nn.Module):
    """Norm and a linear layer, one for all levels or one for each."""

    def __init__(self, dim: int, vocab: int, separate_levels: int | None = None):
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.linear = LevelLinear(separate_levels, dim, vocab) if separate_levels else nn.Linear(dim, vocab)

    def forward(self, states: torch.Tensor, level: int | None = None) -> torch.Tensor:
        normed = self.layer_norm(states)
        return self.linear(normed, level) if isinstance(self.linear, LevelLinear) else self.linear(normed)
