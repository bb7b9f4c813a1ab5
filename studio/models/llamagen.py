"""LlamaGen: a Llama-style decoder over image tokens, conditioned on a class or on the states of a text encoder.

"Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv:2406.06525). The sequence is a prefix
(one class embedding, or `caption_length` projected caption vectors) followed by the image tokens: a grid of them in
raster order, or (our addition) a row. The module tree carries the authors' parameter names, so their state dicts load
as they are.

Scope: the network, its training forward, and the calls that cached decoding needs: `new_cache`, `prefill`, `extend`,
and for trees of tokens `new_tree_cache`, `prefill_states`, `extend_tree`, `logits`. `studio.decoding` samples tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.models.kv_cache import BatchCache, KVCache, TreeCache
from studio.models.llama_blocks import (
    Block,
    CaptionEmbedder,
    ClassEmbedder,
    RMSNorm,
    check_layout,
    default_ffn_dim,
    left_pad,
    prefix_mask,
    rope_table,
)
from studio.models.region_conditioning import build_region_conditioning, check_region_conditioning

PRESETS: dict[str, dict[str, int]] = {
    "B": {"dim": 768, "num_layers": 12, "num_heads": 12},
    "L": {"dim": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"dim": 1280, "num_layers": 36, "num_heads": 20},
    "XXL": {"dim": 1536, "num_layers": 48, "num_heads": 24},
    "XXXL": {"dim": 2560, "num_layers": 48, "num_heads": 40},
    "1B": {"dim": 2048, "num_layers": 22, "num_heads": 32},
    "3B": {"dim": 3200, "num_layers": 24, "num_heads": 32},
    "7B": {"dim": 4096, "num_layers": 32, "num_heads": 32},
}


class LlamaGen(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """The transformer, conditioned on classes (`num_classes`) or on captions (`caption_dim`).

    Args:
        vocab_size: number of image tokens V.
        dim, num_layers, num_heads, num_kv_heads, ffn_dim: sizes; head_dim = dim / num_heads must be a multiple of 4.
        grid_size: side of the token grid; the model samples grid_size**2 tokens. None for a row.
        row_length: tokens of an image where they are a row, such as those of a `OneDPieceTokenizer`.
        num_classes: classes without the null class.
        caption_dim, caption_length: width of the text encoder and number of prefix positions T (1 for classes).
        prefix_rope: "zero" (released weights) or "identity" (prefix keys stay visible to attention by content).
        plan_size: regions a side for region conditioning (`studio.models.region_conditioning`), a divisor of
            `grid_size`; the last `plan_size**2` caption vectors are those of the regions in raster order. 0: none, as
            in released weights.
        class_dropout: probability that the null condition replaces a condition in training.
        dropout: after the embeddings, the attention output and the feed-forward output, in training.

    Raises:
        StudioError: sizes that do not fit together, or conditions that do not fit the model.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        grid_size: int | None = 16,
        num_classes: int | None = None,
        caption_dim: int | None = None,
        caption_length: int | None = None,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        prefix_rope: str = "zero",
        class_dropout: float = 0.1,
        dropout: float = 0.1,
        plan_size: int = 0,
        row_length: int | None = None,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if (num_classes is None) == (caption_dim is None):
            raise StudioError("Give LlamaGen exactly one of num_classes and caption_dim.")
        if caption_dim is not None and not caption_length:
            raise StudioError("A caption-conditional LlamaGen needs caption_length, its number of prefix positions.")
        if dim % num_heads or (dim // num_heads) % 4 or num_heads % num_kv_heads:
            raise StudioError(
                f"dim {dim} must split into {num_heads} heads of a width divisible by 4, "
                f"and the heads into {num_kv_heads} key/value heads."
            )
        if prefix_rope not in ("zero", "identity"):
            raise StudioError(f'prefix_rope is "zero" or "identity", not {shown(prefix_rope)}.')
        check_layout(grid_size, row_length)
        check_region_conditioning(plan_size, grid_size, caption_length, row_length)
        self.cls_embedding: ClassEmbedder | CaptionEmbedder
        if num_classes is not None:
            self.cls_embedding = ClassEmbedder(num_classes, dim)
        else:
            assert caption_dim is not None and caption_length is not None
            self.cls_embedding = CaptionEmbedder(caption_dim, caption_length, dim)
        hidden = ffn_dim or default_ffn_dim(dim)
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Block(dim, num_heads, num_kv_heads, hidden, norm_eps, dropout) for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        if plan_size:
            self.plan_embeddings = build_region_conditioning(plan_size, grid_size, row_length, dim)
        self._rope: torch.Tensor | None = None
        self.apply(self._init_weights)
        nn.init.zeros_(self.output.weight)
        if plan_size:
            nn.init.zeros_(self.plan_embeddings.weight)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LlamaGen":
        """A model of a published size, for ImageNet classes by default.

        Args:
            name: a key of `PRESETS`.
            overrides: other arguments of the class, such as `caption_dim=2048, caption_length=120`.

        Raises:
            StudioError: an unknown name.
        """
        if name not in PRESETS:
            raise StudioError(f"There is no LlamaGen size {shown(name)}; the sizes are {', '.join(PRESETS)}.")
        condition = {} if "caption_dim" in overrides else {"num_classes": 1000}
        return cls(**{**condition, **PRESETS[name], **overrides})

    @property
    def prefix_length(self) -> int:
        """Positions before the first image token: 1 for classes, `caption_length` for captions."""
        return self.config.caption_length if self.config.caption_dim is not None else 1

    @property
    def num_tokens(self) -> int:
        """Image tokens of one image."""
        return self.config.row_length or self.config.grid_size**2

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.config.dim // self.config.num_heads

    left_pad = staticmethod(left_pad)
    prefix_mask = staticmethod(prefix_mask)

    def rope(self) -> torch.Tensor:
        """The rotary table (prefix + image tokens, head_dim // 2, 2), float32, built once per device."""
        device = next(self.parameters()).device
        if self._rope is None or self._rope.device != device:
            table = rope_table(
                self.config.grid_size,
                self.head_dim,
                self.prefix_length,
                self.config.rope_base,
                self.config.prefix_rope,
                self.config.row_length,
            )
            self._rope = table.to(device)
        return self._rope

    def embed_condition(
        self,
        *,
        class_labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        caption_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeds the condition as the prefix of the sequence.

        Args:
            class_labels: (B,) int64, for a class-conditional model.
            captions: (B, T, caption_dim), for a text-conditional model.
            caption_mask: (B, T), true at vectors that are not padding; None: all.
            drop: (B,) bool, rows that get the null condition; a dropped caption keeps its padding mask.

        Returns:
            The prefix (B, T, dim) and the mask (B, T) of its valid positions (None: all valid).

        Raises:
            StudioError: a condition that does not fit the model.
        """
        if self.config.num_classes is not None:
            if class_labels is None or captions is not None:
                raise StudioError("This model is class-conditional: pass class_labels and no captions.")
            return self.cls_embedding(class_labels, drop), None
        if captions is None or class_labels is not None:
            raise StudioError("This model is text-conditional: pass captions and no class_labels.")
        expected = (self.config.caption_length, self.config.caption_dim)
        if tuple(captions.shape[1:]) != expected:
            raise StudioError(
                f"Captions must have shape (batch, {expected[0]}, {expected[1]}), not {tuple(captions.shape)}."
            )
        if caption_mask is not None:
            captions, caption_mask = left_pad(captions, caption_mask)
        return self.cls_embedding(captions, drop), caption_mask

    def region_conditioning(self, prefix: torch.Tensor) -> torch.Tensor | None:
        """What is added to the input of each position: (rows, T + image tokens, dim), or None without regions.

        The last `plan_size**2` vectors of the prefix (rows, T, dim) give one vector for each image token. It is added
        at the position that predicts the token, one before the token's own.
        """
        if not self.config.plan_size:
            return None
        return F.pad(self.plan_embeddings(prefix), (0, 0, prefix.shape[1] - 1, 1))

    def inputs(self, prefix: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Inputs (rows, T + n, dim) of the layers: prefix, embedded tokens (rows, n, dim) and region conditioning."""
        x, regions = torch.cat((prefix, embedded.to(prefix.dtype)), dim=1), self.region_conditioning(prefix)
        return x if regions is None else x + regions[:, : x.shape[1]]

    def run_layers(
        self,
        x: torch.Tensor,
        rope: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """States (rows, n, dim) behind all blocks and the final norm.

        Args:
            x: inputs (rows, n, dim); with a cache, they continue what it holds.
            rope: their rows of the rotary table, (n, head_dim // 2, 2) or (rows, n, head_dim // 2, 2).
            mask: of attention; causal when None.
            cache: keys and values of the positions before.
        """
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        class_labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        caption_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, n + 1, V), float32, of which entry i predicts image token i.

        Training feeds `tokens[:, :-1]` and compares with `tokens`.

        Args:
            tokens: the first n image tokens (B, n), int64.
            class_labels, captions, caption_mask: as of `embed_condition`; captions may be padded on either side.
            drop: rows (B,) that get the null condition. In training mode without it, conditions are dropped with
                probability `class_dropout`, sampled from the global generator.

        Raises:
            StudioError: more tokens than an image has, or a condition that does not fit the model.
        """
        batch, n = tokens.shape
        if drop is None and self.training and self.config.class_dropout > 0:
            drop = torch.rand(batch, device=tokens.device) < self.config.class_dropout
        prefix, valid = self.embed_condition(
            class_labels=class_labels, captions=captions, caption_mask=caption_mask, drop=drop
        )
        length = prefix.shape[1] + n
        table = self.rope()
        if length > len(table):
            raise StudioError(f"The model samples {self.num_tokens} tokens; {n} were given.")
        x = self.tok_dropout(self.inputs(prefix, self.tok_embeddings(tokens)))
        x = self.run_layers(x, table[:length], self.prefix_mask(valid, length))
        return self.output(x[:, prefix.shape[1] - 1 :]).float()

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for `rows` sequences, in the model's dtype and on its device."""
        return KVCache(**self._cache_sizes(rows))

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """An empty cache for `rows` sequences, with space for `pending` positions that are not kept yet."""
        sizes = self._cache_sizes(rows)
        return TreeCache(**{**sizes, "max_length": sizes["max_length"] + pending})

    def new_prefix_cache(self, rows: int) -> TreeCache:
        """An empty cache for the prefix of `rows` sequences."""
        return TreeCache(**{**self._cache_sizes(rows), "max_length": self.prefix_length})

    def new_batch_cache(self, rows: int, pending: int) -> BatchCache:
        """An empty cache that up to `rows` sequences may join, with space for `pending` positions."""
        sizes = self._cache_sizes(rows)
        return BatchCache(**{**sizes, "max_length": sizes["max_length"] + pending})

    def _cache_sizes(self, rows: int) -> dict[str, Any]:
        return {
            "num_layers": self.config.num_layers,
            "rows": rows,
            "num_kv_heads": self.config.num_kv_heads or self.config.num_heads,
            "max_length": self.prefix_length + self.num_tokens,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "device": self.device,
        }

    def prefill(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Stores the prefix (rows, T, dim) in an empty cache; logits (rows, V), float32, of the first image token."""
        return self.logits(self.prefill_states(prefix, valid, cache)[:, -1])

    def prefill_states(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """As `prefill`, but returns the states (rows, T, dim) of all prefix positions, which `logits` reads."""
        length = prefix.shape[1]
        x = self.prepare_inputs(prefix, cache)
        states = self.run_layers(x, self.rope()[:length], self.prefix_mask(valid, length), cache)
        if valid is not None:
            cache.mask_prefix(valid)
        return states

    def prepare_inputs(self, prefix: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Inputs of the layers for a prefix (rows, T, dim); the cache keeps its region conditioning for the tokens."""
        cache.region_conditioning = self.region_conditioning(prefix)
        return cache.add_region_conditioning(prefix)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V), float32, of the token behind the position of each state (..., dim)."""
        return self.output(states).float()

    def extend(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Feeds tokens (rows, n) behind what the cache holds; float32 logits (rows, n, V) of the tokens after them."""
        rope = self.rope()[cache.length : cache.length + tokens.shape[1]]
        mask = cache.attention_mask(tokens.shape[1])
        x = cache.add_region_conditioning(self.tok_embeddings(tokens))
        return self.logits(self.run_layers(x, rope, mask, cache))

    def extend_tree(
        self, tokens: torch.Tensor, cache: TreeCache, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Feeds trees of tokens (rows, n) behind what each row of the cache keeps; states (rows, n, dim).

        `positions` (rows, n) count from the start of the prefix; `visible` is as of `TreeCache.tree_mask`. The new
        positions are pending in the cache.
        """
        x, mask = cache.add_region_conditioning(self.tok_embeddings(tokens), positions), cache.tree_mask(visible)
        return self.run_layers(x, self.rope()[positions], mask, cache)
