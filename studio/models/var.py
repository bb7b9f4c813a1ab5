"""VAR: a transformer that predicts images scale by scale, coarse to fine.

"Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (arXiv:2404.02905). The sequence
holds the tokens of all scales, in raster order each; a token sees its own scale and the coarser ones. The input of a
scale is not its tokens but the image so far, resized to it (`VARTokenizer.inputs`), so a whole scale is predicted at
once. The class modulates every block and the head (adaptive layer norm). The module tree carries the authors' parameter
names.

Deviations from the authors' code: conditions are dropped only in training mode (theirs drops them in evaluation too);
several scales may be fed behind a cache at once. Left out: the variant with one shared modulation (depth 36).
"""

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.errors import StudioError

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_LARGEST_SCALE = math.log(100)


def bounds_of(scales: tuple[int, ...]) -> tuple[int, ...]:
    """Number of positions in the first 0, 1, ... scales."""
    return tuple(accumulate((side * side for side in scales), initial=0))


def level_of(scales: tuple[int, ...]) -> torch.Tensor:
    """Index of the scale of each position, (n,) int64."""
    return torch.repeat_interleave(torch.arange(len(scales)), torch.tensor(scales) ** 2)


class Attention(nn.Module):
    """Self-attention of unit queries and keys, with one learned scale per head."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, past: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Attention over x (B, n, dim) and `past`, the list of keys and values so far, which is updated in place."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        queries = F.normalize(queries, dim=-1) * self.scale_mul_1H11.clamp(max=_LARGEST_SCALE).exp()
        keys = F.normalize(keys, dim=-1)
        if past is not None:
            if past:
                keys, values = torch.cat((past[0], keys), dim=2), torch.cat((past[1], values), dim=2)
            past[:] = [keys, values]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(dim: int, parts: int) -> nn.Sequential:
    """SiLU and a linear layer to `parts` vectors of width dim."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Block(nn.Module):
    """Attention and feed-forward behind norms without weights, gated, scaled and shifted by the class."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.eps = eps
        self.attn, self.ffn, self.ada_lin = Attention(dim, num_heads), FeedForward(dim), modulation(dim, 6)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None,
        past: list[torch.Tensor] | None = None,
        between: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, n, dim) modulated by the class vector (B, dim); `between` is added after the attention."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(context)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self._norm(x) * (1 + scale1) + shift1, mask, past)
        x = x if between is None else x + between
        return x + gate2 * self.ffn(self._norm(x) * (1 + scale2) + shift2)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class HeadNorm(nn.Module):
    """The norm before the head, scaled and shifted by the class."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.ada_lin = eps, modulation(dim, 2)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada_lin(context)[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift


class VAR(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """The transformer.

    Args:
        vocab_size, code_dim: size V and width C of the codebook.
        depth, dim, num_heads: sizes; published models have dim = 64 depth and depth heads.
        num_classes: classes without the null class.
        scales: side of the grid at each scale.
        class_dropout: probability that the null class replaces a class in training.

    Raises:
        StudioError: a width that does not split into heads.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        code_dim: int = 32,
        depth: int = 16,
        dim: int = 1024,
        num_heads: int = 16,
        num_classes: int = 1000,
        scales: tuple[int, ...] = SCALES,
        norm_eps: float = 1e-6,
        class_dropout: float = 0.1,
    ):
        super().__init__()
        if dim % num_heads:
            raise StudioError(f"dim {dim} must split into {num_heads} heads.")
        scales, std = tuple(scales), (1 / dim / 3) ** 0.5
        self.word_embed = nn.Linear(code_dim, dim)
        self.class_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, bounds_of(scales)[-1], dim))
        self.lvl_embed = nn.Embedding(len(scales), dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, norm_eps) for _ in range(depth))
        self.head_nm, self.head = HeadNorm(dim, norm_eps), nn.Linear(dim, vocab_size)
        for weight in (self.class_emb.weight, self.pos_start, self.pos_1LC, self.lvl_embed.weight):
            nn.init.trunc_normal_(weight, std=std)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Number of known positions after 0, 1, ... steps; a step is one scale."""
        return bounds_of(tuple(self.config.scales))

    def embed_class(self, class_labels: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        """Class vectors (B, dim) of labels (B,); rows marked by `drop` (B,) get the null class."""
        if drop is not None:
            class_labels = torch.where(drop, self.config.num_classes, class_labels)
        return self.class_emb(class_labels)

    def extend(
        self,
        inputs: torch.Tensor,
        context: torch.Tensor,
        first: int,
        last: int,
        cache: list[list[torch.Tensor]] | list[None],
    ) -> torch.Tensor:
        """Feeds scales first to last - 1 behind what the cache holds; float32 logits (B, n, V) of their tokens.

        Args:
            inputs: resized images (B, n, C) of these scales; the input of scale 0 is the class, so it has none.
            context: class vectors (B, dim).
            cache: one list per block, at first `[[] for _ in model.blocks]`; or a None per block without a cache.
        """
        start, end = self.bounds[first], self.bounds[last]
        x = self.word_embed(inputs.to(context.dtype))
        if first == 0:
            x = torch.cat((context[:, None] + self.pos_start, x), dim=1)
        levels = level_of(tuple(self.config.scales)).to(x.device)[:end]
        x = x + self.lvl_embed(levels[start:]) + self.pos_1LC[:, start:end]
        mask = levels[start:, None] >= levels if last - first > 1 else None
        for block, past in zip(self.blocks, cache, strict=True):
            x = block(x, context, mask, past)
        return self.head(self.head_nm(x, context)).float()

    def forward(
        self, inputs: torch.Tensor, class_labels: torch.Tensor, drop: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, n, V), float32, of the tokens of all scales.

        Args:
            inputs: resized images (B, n - 1, C) of the true tokens, of scales 1 and up.
            class_labels: (B,).
            drop: rows (B,) that get the null class. In training mode without it, classes are dropped with probability
                `class_dropout`, sampled from the global generator.
        """
        if drop is None and self.training and self.config.class_dropout > 0:
            drop = torch.rand(len(inputs), device=inputs.device) < self.config.class_dropout
        context = self.embed_class(class_labels, drop)
        return self.extend(inputs, context, 0, len(self.config.scales), [None] * len(self.blocks))
