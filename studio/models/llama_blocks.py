"""Blocks of a Llama-style decoder as LlamaGen has them (arXiv:2406.06525), under the authors' parameter names."""

import torch
import torch.nn.functional as F
from torch import nn

from studio.models.kv_cache import KVCache
from studio.models.positions import rotate


def default_ffn_dim(dim: int) -> int:
    """Hidden width of the feed-forward network: 2/3 of 4*dim, rounded up to a multiple of 256."""
    hidden = int(2 * (4 * dim) / 3)
    return -(-hidden // 256) * 256


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and cast back before the weight is applied."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention with one fused projection (query, key, value rows) and optional grouped key/value heads."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.wqkv = nn.Linear(dim, dim + 2 * num_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, mask, cache: KVCache | None, layer: int):
        rows, n, dim = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.wqkv(x).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        turned = rotate(qkv[:, :, : heads + kv_heads], rope).transpose(1, 2)
        queries, keys = turned[:, :heads], turned[:, heads:]
        values = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(layer, torch.stack((keys, values), dim=1))
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None and n > 1, enable_gqa=kv_heads != heads
        )
        return self.dropout(self.wo(out.transpose(1, 2).reshape(rows, n, dim)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float, dropout: float):
        super().__init__()
        self.attention = Attention(dim, num_heads, num_kv_heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(self, x, rope, mask, cache, layer):
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))
