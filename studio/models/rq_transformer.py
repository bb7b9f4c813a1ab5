"""RQ-Transformer: one transformer over the cells of a grid, and a small one over the levels of each cell's codes.

"Autoregressive Image Generation using Residual Quantization" (arXiv:2203.01941), section 3.2: the spatial transformer
reads the condition and the cells so far, each as the sum of its code vectors, and gives a context for the next cell;
the depth transformer reads that context and the codes of the cell so far, coarse to fine. The module tree carries the
authors' parameter names.

Deviations from the authors' code: both transformers keep a cache, so no prefix is embedded twice; levels may have
codebooks of different size (theirs masks the wrong axes then), with logits of -inf where a level has no code. Ours: a
condition may also be the states of a text encoder, with a null caption for guidance, as LlamaGen has them.

Scope: the network, its training forward, and the calls that sampling needs: `new_caches`, `first_context`,
`next_context`, `level_logits`. It holds no codebook of the tokenizer: that comes with each call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.models.kv_cache import KVCache
from studio.models.llama_blocks import CaptionEmbedder, left_pad, prefix_mask

PRESETS: dict[str, dict[str, int]] = {
    "480M": {"dim": 1536, "spatial_layers": 12, "depth_layers": 4, "spatial_heads": 24, "depth_heads": 24},
    "1.4B": {"dim": 1536, "spatial_layers": 42, "depth_layers": 6, "spatial_heads": 24, "depth_heads": 24},
}
ACTIVATIONS = ("gelu", "quick_gelu")


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, layer: int) -> torch.Tensor:
        x = x + self.dropout(self.attn(self.ln1(x), mask, cache, layer))
        return x + self.dropout(self.mlp(self.ln2(x)))


class Stack(nn.Module):
    """Blocks without a norm behind them."""

    def __init__(self, layers: int, dim: int, num_heads: int, activation: str, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, activation, dropout) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """x (rows, n, dim), behind what the cache holds.

        `mask` (rows, 1, n, n) is true where a position of x sees another one; causal when None.
        """
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return x


class LevelEmbedding(nn.Module):
    """One embedding table for each level, in one weight (sum of sizes, dim)."""

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


class RQTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """The two transformers, conditioned on classes, captions of a text encoder, or words with embeddings of their own.

    Args:
        grid: rows and columns of cells.
        depth: levels D of a cell.
        vocab_size: number of codes, one for all levels or one of each.
        code_dim: length of the tokenizer's code vectors, where they are read.
        dim, spatial_layers, depth_layers, spatial_heads, depth_heads: sizes of the transformers.
        num_classes: classes, or 1 without a condition; exactly one of this, `caption_dim` and `caption_words` is given.
        caption_dim, caption_length: width of the text encoder and its number of positions.
        caption_words: vocabulary of texts of `caption_length` words, which are embedded here and also predicted.
        spatial_reads_codes, depth_reads_codes: whether code vectors or learned embeddings enter that transformer.
        depth_reads_sums: whether a level sees the sum of the levels before it, or only the level before it.
        shared_embedding, shared_classifier: one learned embedding, one classifier for all levels.
        activation: "gelu" (exact) or "quick_gelu".
        dropout: behind attention and feed-forward, in training.
        condition_dropout: probability that the null caption replaces a caption of a text encoder in training.

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        grid: tuple[int, int] = (8, 8),
        depth: int = 4,
        vocab_size: int | tuple[int, ...] = 16384,
        code_dim: int = 256,
        dim: int = 1536,
        spatial_layers: int = 12,
        depth_layers: int = 4,
        spatial_heads: int = 24,
        depth_heads: int = 24,
        num_classes: int | None = None,
        caption_dim: int | None = None,
        caption_length: int | None = None,
        caption_words: int | None = None,
        spatial_reads_codes: bool = True,
        depth_reads_codes: bool = True,
        depth_reads_sums: bool = True,
        shared_embedding: bool = True,
        shared_classifier: bool = True,
        activation: str = "gelu",
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        self.vocab_sizes = (vocab_size,) * depth if isinstance(vocab_size, int) else tuple(vocab_size)
        largest, learns_embedding = max(self.vocab_sizes), not (spatial_reads_codes and depth_reads_codes)
        if len(self.vocab_sizes) != depth:
            raise StudioError(f"{depth} levels need one vocab_size or {depth} of them; got {shown(vocab_size)}.")
        if dim % spatial_heads or dim % depth_heads:
            raise StudioError(f"dim {dim} must split into {spatial_heads} heads and into {depth_heads} heads.")
        if activation not in ACTIVATIONS:
            raise StudioError(f"activation is one of {', '.join(ACTIVATIONS)}, not {shown(activation)}.")
        if [num_classes, caption_dim, caption_words].count(None) != 2:
            raise StudioError("Give RQTransformer exactly one of num_classes, caption_dim and caption_words.")
        if num_classes is None and not caption_length:
            raise StudioError("An RQTransformer that reads texts needs caption_length, its number of positions for it.")
        self.pos_emb_cond = nn.Parameter(torch.empty(1, self.prefix_length, dim))
        self.pos_emb_hw = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim))
        self.pos_emb_d = nn.Parameter(torch.empty(1, depth, dim))
        self.cond_emb: nn.Module
        if caption_dim is not None and caption_length is not None:
            self.cond_emb = CaptionEmbedder(caption_dim, caption_length, dim)
        else:
            self.cond_emb = nn.Embedding(num_classes or caption_words or 0, dim)
        if spatial_reads_codes:
            self.input_mlp = nn.Linear(code_dim, dim)
        if depth_reads_codes:
            self.head_mlp = nn.Linear(code_dim, dim)
        if learns_embedding:
            self.tok_emb = nn.Embedding(largest, dim) if shared_embedding else LevelEmbedding(self.vocab_sizes, dim)
        self.body_transformer = Stack(spatial_layers, dim, spatial_heads, activation, dropout)
        self.head_transformer = Stack(depth_layers, dim, depth_heads, activation, dropout)
        self.classifier = Classifier(dim, largest, None if shared_classifier else depth)
        if caption_words is not None:
            self.cond_classifier = Classifier(dim, caption_words)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "RQTransformer":
        """A model of a published size, for ImageNet classes by default.

        Args:
            name: a key of `PRESETS`.
            overrides: other arguments of the class.

        Raises:
            StudioError: an unknown name.
        """
        if name not in PRESETS:
            raise StudioError(f"There is no RQ-Transformer of size {shown(name)}; the sizes are {', '.join(PRESETS)}.")
        condition = {} if {"caption_dim", "caption_words"} & overrides.keys() else {"num_classes": 1000}
        return cls(**{**condition, **PRESETS[name], **overrides})

    @property
    def prefix_length(self) -> int:
        """Positions of the condition: 1 for classes, `caption_length` for texts."""
        return 1 if self.config.num_classes is not None else self.config.caption_length

    @property
    def num_tokens(self) -> int:
        """Cells of an image."""
        return self.config.grid[0] * self.config.grid[1]

    def forward(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor,
        codebooks: list[torch.Tensor] | None = None,
        *,
        valid: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of all tokens, and of the words of a text behind its first.

        Args:
            tokens: codes (B, h, w, D) of whole grids.
            condition: classes or words (B, T), int64; zeros (B, 1) for a model without a condition; or captions
                (B, caption_length, caption_dim), the states of a text encoder.
            codebooks: the tokenizer's code vectors (K_d, C) of each level, where the model reads them.
            valid: which states of captions (B, caption_length) are not padding; all when None.
            drop: rows (B,) that get the null caption. In training mode without it, captions are dropped with
                probability `condition_dropout`, sampled from the global generator.

        Returns:
            `(logits (B, h, w, D, V), word logits (B, T - 1, caption_words) or None)`, float32.

        Raises:
            StudioError: another grid, a condition that does not fit the model, or missing codebooks.
        """
        grid = (*self.config.grid, self.config.depth)
        if tuple(tokens.shape[1:]) != grid:
            raise StudioError(f"The model samples tokens of shape {grid}; got {tuple(tokens.shape[1:])}.")
        cells = tokens.flatten(1, 2)
        contexts, words = self.contexts(cells, condition, codebooks, valid=valid, drop=drop)
        logits = self.logits(contexts, cells, codebooks).unflatten(1, self.config.grid)
        reads_words = self.config.caption_words is not None and words.shape[1] > 0
        return logits, self.cond_classifier(words).float() if reads_words else None

    def contexts(
        self,
        cells: torch.Tensor,
        condition: torch.Tensor,
        codebooks: list[torch.Tensor] | None = None,
        *,
        valid: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts of all cells, each of which sees the cells before it.

        Args:
            cells: codes (B, L, D).
            condition, codebooks, valid, drop: as of `forward`.

        Returns:
            Contexts (B, L, dim), and the states (B, T - 1, dim) of all positions of the condition but the last, whose
            state is the first context.
        """
        takes_captions = self.config.caption_dim is not None
        if drop is None and takes_captions and self.training and self.config.condition_dropout > 0:
            drop = torch.rand(len(cells), device=cells.device) < self.config.condition_dropout
        prefix, valid = self._embed_condition(condition, valid, drop)
        x = torch.cat((prefix, self._embed_cells(cells[:, :-1], 0, codebooks)), dim=1)
        states = self.body_transformer(x, prefix_mask(valid, x.shape[1]))
        last = prefix.shape[1] - 1
        return states[:, last:], states[:, :last]

    def logits(
        self, contexts: torch.Tensor, cells: torch.Tensor, codebooks: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (B, L, D, V), float32, of all codes of the cells.

        Args:
            contexts: of the cells, (B, L, dim).
            cells: codes (B, L, D); a code sees those before it in its cell, and the cell's context.
            codebooks: as of `forward`.
        """
        entering = torch.cat((contexts[:, :, None], self._embed_levels(cells[..., :-1], codebooks)), dim=2)
        deep = self.head_transformer((entering + self.pos_emb_d[:, None]).flatten(0, 1)).view(*cells.shape, -1)
        return self.classifier(deep).float().masked_fill(self._absent(), float("-inf"))

    def new_caches(self, rows: int) -> tuple[KVCache, KVCache]:
        """Empty caches for `rows` images: of the spatial transformer, and of the depth transformer for one cell."""
        config = self.config
        common: dict[str, Any] = {"rows": rows, "dtype": self.dtype, "device": self.device}
        spatial, depth = (
            KVCache(num_layers=layers, num_kv_heads=heads, head_dim=config.dim // heads, max_length=length, **common)
            for layers, heads, length in (
                (config.spatial_layers, config.spatial_heads, self.prefix_length + self.num_tokens - 1),
                (config.depth_layers, config.depth_heads, config.depth),
            )
        )
        return spatial, depth

    def first_context(
        self,
        condition: torch.Tensor,
        cache: KVCache,
        *,
        valid: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Context (B, dim) of the first cell.

        Args:
            condition, valid, drop: as of `forward`.
            cache: the empty spatial cache, in which the condition is stored.
        """
        prefix, valid = self._embed_condition(condition, valid, drop)
        states = self.body_transformer(prefix, prefix_mask(valid, prefix.shape[1]), cache)
        if valid is not None:
            cache.mask_prefix(valid)
        return states[:, -1]

    def next_context(
        self, cell: torch.Tensor, index: int, cache: KVCache, codebooks: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Context (B, dim) of cell `index` + 1, from the codes `cell` (B, D) of cell `index`."""
        return self.body_transformer(self._embed_cells(cell[:, None], index, codebooks), cache=cache)[:, -1]

    def level_logits(
        self,
        context: torch.Tensor,
        codes: torch.Tensor,
        cache: KVCache,
        codebooks: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits (B, V), float32, of level d of a cell, from its context (B, dim) and its codes (B, d) so far.

        The depth cache holds the levels before d of the same cell; at d = 0 it is emptied.
        """
        level = codes.shape[1]
        if level == 0:
            cache.crop(0)
        entering = context if level == 0 else self._embed_levels(codes[:, None], codebooks)[:, 0, -1]
        deep = self.head_transformer((entering + self.pos_emb_d[:, level])[:, None], cache=cache)[:, 0]
        return self.classifier(deep, level).float().masked_fill(self._absent()[level], float("-inf"))

    def _embed_condition(
        self, condition: torch.Tensor, valid: torch.Tensor | None, drop: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prefix (B, T, dim) and the mask (B, T) of its valid positions (None: all)."""
        most, width = self.prefix_length, self.config.caption_dim
        if width is not None:
            if tuple(condition.shape[1:]) != (most, width):
                raise StudioError(f"Captions are (B, {most}, {width}) numbers; got {tuple(condition.shape)}.")
            if valid is not None:
                condition, valid = left_pad(condition, valid)
            return self.cond_emb(condition, drop) + self.pos_emb_cond, valid
        if valid is not None or drop is not None:
            raise StudioError("This model has no null condition and no padding: leave out guidance.")
        if condition.ndim != 2 or not 1 <= condition.shape[1] <= most:
            raise StudioError(f"A condition is (B, T) numbers with T from 1 to {most}; got {tuple(condition.shape)}.")
        return self.cond_emb(condition) + self.pos_emb_cond[:, : condition.shape[1]], None

    def _embed_cells(self, cells: torch.Tensor, first: int, codebooks: list[torch.Tensor] | None) -> torch.Tensor:
        """Inputs (B, n, dim) of the spatial transformer for the cells (B, n, D) from index `first` on."""
        if self.config.spatial_reads_codes:
            vectors = self.input_mlp(self._code_vectors(cells, codebooks))
        else:
            vectors = self.tok_emb(cells)
        return vectors.sum(dim=-2) + self.pos_emb_hw[:, first : first + cells.shape[1]]

    def _embed_levels(self, codes: torch.Tensor, codebooks: list[torch.Tensor] | None) -> torch.Tensor:
        """Inputs (B, n, d, dim) of the depth transformer behind each of the first d levels, for codes (B, n, d)."""
        reads_codes = self.config.depth_reads_codes
        vectors = self._code_vectors(codes, codebooks) if reads_codes else self.tok_emb(codes)
        if self.config.depth_reads_sums:
            vectors = vectors.cumsum(dim=-2)
        return self.head_mlp(vectors) if reads_codes else vectors

    def _code_vectors(self, codes: torch.Tensor, codebooks: list[torch.Tensor] | None) -> torch.Tensor:
        if codebooks is None:
            raise StudioError("This model reads code vectors: pass the codebooks of its tokenizer.")
        vectors = torch.empty(*codes.shape, self.config.code_dim, dtype=self.dtype, device=codes.device)
        for level in range(codes.shape[-1]):
            vectors[..., level, :] = F.embedding(codes[..., level], codebooks[level])
        return vectors

    def _absent(self) -> torch.Tensor:
        """(D, V), true where a level has no such code."""
        sizes = torch.tensor(self.vocab_sizes, device=self.device)
        return torch.arange(max(self.vocab_sizes), device=self.device) >= sizes[:, None]
