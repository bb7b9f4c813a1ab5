"""Parts of LlamaGen's Llama-style decoder (arXiv:2406.06525), under the authors' parameter names.

Condition embedders for classes and for the states of a text encoder, rotary positions (arXiv:2104.09864) of image
tokens in a grid or a row behind a prefix, and the transformer block.
"""

import torch
import torch.nn.functional as F
from torch import nn

from studio.errors import StudioError
from studio.models.kv_cache import KVCache


class ClassEmbedder(nn.Module):
    """Embeddings of classes; the last row is the null class."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, 1, dim) of labels (B,); rows marked by `drop` (B,) get the null class."""
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class CaptionProjection(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, caption_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


NULL_CAPTION = "uncond_embedding"
"""The name of the null caption among the weights of a `CaptionEmbedder`."""


class CaptionEmbedder(nn.Module):
    """Projects caption vectors; the null caption of dropped rows is fixed, never trained."""

    uncond_embedding: torch.Tensor

    def __init__(self, caption_dim: int, caption_length: int, dim: int):
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(caption_length, caption_dim) / caption_dim**0.5)

    def forward(self, captions: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, T, dim) of captions (B, T, caption_dim); rows marked by `drop` (B,) get the null caption."""
        if drop is not None:
            captions = torch.where(drop[:, None, None], self.uncond_embedding.to(captions.dtype), captions)
        return self.cap_proj(captions)


def left_pad(captions: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the valid vectors of captions to the end, in order, and zeroes the padding.

    Args:
        captions: (B, T, C).
        mask: (B, T), true at valid vectors, wherever they are; left-padded rows come back unchanged.

    Returns:
        The captions and their mask.
    """
    mask = mask.bool()
    order = torch.argsort(mask.int(), dim=1, stable=True)
    mask = mask.gather(1, order)
    captions = captions.gather(1, order[:, :, None].expand_as(captions))
    return captions * mask[:, :, None].to(captions.dtype), mask


def prefix_mask(valid: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Attention mask (B, 1, length, length), true where a query sees a key: causal and not padding, or itself.

    Args:
        valid: (B, T), false at padding among the first T positions; None: no padding, so no mask is needed.
        length: positions of the sequence.
    """
    if valid is None:
        return None
    mask = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril().repeat(len(valid), 1, 1)
    mask[:, :, : valid.shape[1]] &= valid[:, None, :length]
    mask.diagonal(dim1=1, dim2=2).fill_(True)
    return mask[:, None]


def check_layout(grid_size: int | None, row_length: int | None) -> None:
    """Raises a `StudioError` unless image tokens are either a grid or a row."""
    if (grid_size is None) == (row_length is None) or (row_length is not None and row_length < 1):
        raise StudioError(
            "Image tokens are a grid or a row: give grid_size, or row_length of at least 1 and grid_size=None; got "
            f"grid_size {grid_size!r} and row_length {row_length!r}."
        )


def rope_table(
    grid_size: int | None,
    head_dim: int,
    prefix_length: int,
    base: float,
    prefix_rope: str,
    row_length: int | None = None,
) -> torch.Tensor:
    """Rotary table (cos, sin) of all positions: (prefix_length + image tokens, head_dim // 2, 2), float32.

    A token in cell (row, column) of a grid rotates the first half of its pairs by row and the second half by column; a
    token of a row rotates all pairs by its index (arXiv:2104.09864).

    Args:
        grid_size: side of the token grid; None for a row.
        head_dim: width of an attention head.
        prefix_length: positions before the image tokens.
        base: of the frequencies.
        prefix_rope: "zero", where prefix positions get cos = sin = 0, so that their queries and keys vanish (as in the
            released weights), or "identity", where they are not rotated.
        row_length: tokens of a row; None for a grid.

    Raises:
        StudioError: neither a grid nor a row.
    """
    half = head_dim // 2
    if row_length is not None:
        frequencies = 1.0 / (base ** (torch.arange(half).float() / half))
        image = torch.outer(torch.arange(row_length).float(), frequencies)
    elif grid_size is not None:
        frequencies = 1.0 / (base ** (torch.arange(0, half, 2)[: half // 2].float() / half))
        angles = torch.outer(torch.arange(grid_size).float(), frequencies)
        rows = angles[:, None, :].expand(grid_size, grid_size, -1)
        columns = angles[None, :, :].expand(grid_size, grid_size, -1)
        image = torch.cat((rows, columns), dim=-1).reshape(grid_size * grid_size, half)
    else:
        raise StudioError("Rotary positions need a grid or a row: give grid_size or row_length.")
    prefix = torch.zeros(prefix_length, half, 2)
    if prefix_rope == "identity":
        prefix[..., 0] = 1.0
    return torch.cat((prefix, torch.stack((image.cos(), image.sin()), dim=-1)))


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates the interleaved pairs of x, in float32.

    Args:
        x: (rows, n, heads, head_dim).
        table: rows of the rotary table, (n, head_dim // 2, 2), or (rows, n, head_dim // 2, 2) for each row its own.
    """
    cos, sin = table[..., None, :, 0], table[..., None, :, 1]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).type_as(x)


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

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, layer: int
    ) -> torch.Tensor:
        rows, n, dim = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.wqkv(x).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        rotated = rotate(qkv[:, :, : heads + kv_heads], rope).transpose(1, 2)
        queries, keys = rotated[:, :heads], rotated[:, heads:]
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float, dropout: float):
        super().__init__()
        self.attention = Attention(dim, num_heads, num_kv_heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, layer: int
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))
