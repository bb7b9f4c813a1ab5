"""EAGLE's drafter, as LANTERN uses it: a small network that predicts the states of a LlamaGen.

"EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty" (arXiv:2401.15077, section 4.1), for image tokens
in LANTERN (arXiv:2410.03355). Position i reads the target's state i (behind its final norm) and the embedding of token
i + 1, and predicts state i + 1, from which the target's own head gives logits. Blocks are those of the target, with no
norm before the first attention. Position i has the rotary position of the token that it reads.

Deviations from the authors' code: padding of captions is hidden from attention, as in the target; where the target has
region conditioning, that of the next cell is added to the embedding of a token.

Scope: the network. `studio.decoding.eagle` drafts tokens with it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.errors import StudioError
from studio.models.kv_cache import TreeCache
from studio.models.llama_blocks import Block, check_layout, default_ffn_dim, rope_table
from studio.models.llamagen import LlamaGen


class Drafter(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Predicts states of a `LlamaGen`.

    Args:
        vocab_size, dim, num_heads, num_kv_heads, ffn_dim, grid_size, row_length, rope_base, prefix_rope: as of the
            target.
        prefix_length: the target's number of prefix positions.
        num_layers: blocks; published drafters have one.
        reads_plan: whether the target has region conditioning (`LlamaGen.region_conditioning`), which the drafter then
            reads too.
        norm_eps: of the norms, 1e-6 in published drafters.
        own_embeddings: whether token embeddings are stored with the drafter, as in published ones; otherwise it uses a
            copy of the target's, which `read_embeddings` makes. A pipeline does so with its transformer.

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        dim: int = 1280,
        num_layers: int = 1,
        num_heads: int = 20,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        grid_size: int | None = 16,
        prefix_length: int = 120,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
        prefix_rope: str = "zero",
        reads_plan: bool = False,
        row_length: int | None = None,
        own_embeddings: bool = True,
    ):
        super().__init__()
        check_layout(grid_size, row_length)
        num_kv_heads = num_kv_heads or num_heads
        if dim % num_heads or (dim // num_heads) % 4 or num_heads % num_kv_heads:
            raise StudioError(
                f"dim {dim} must split into {num_heads} heads of a width divisible by 4, "
                f"and the heads into {num_kv_heads} key/value heads."
            )
        if own_embeddings:
            self.embed_tokens = nn.Embedding(vocab_size, dim)
        else:
            self.register_buffer("read_tokens", torch.full((vocab_size, dim), torch.nan), persistent=False)
        self.fc = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            Block(dim, num_heads, num_kv_heads, ffn_dim or default_ffn_dim(dim), norm_eps, 0.0)
            for _ in range(num_layers)
        )
        self.layers[0].attention_norm = nn.Identity()
        self._rope: torch.Tensor | None = None
        self.apply(LlamaGen._init_weights)
        nn.init.zeros_(self.fc.bias)

    def check_target(self, target: LlamaGen) -> None:
        """Raises a `StudioError` for a target whose sizes differ from those of the drafter."""
        ours = self.config
        for name in ("vocab_size", "dim", "grid_size", "row_length"):
            if ours.get(name) != target.config.get(name):
                raise StudioError(
                    f"The drafter has {name} {ours.get(name)}, the model {target.config.get(name)}: use its own."
                )
        if ours.prefix_length != target.prefix_length:
            raise StudioError(
                f"The drafter is for prefixes of {ours.prefix_length}, the model has {target.prefix_length} positions."
            )
        if ours.reads_plan != bool(target.config.get("plan_size")):
            raise StudioError("Only one of drafter and model has region conditioning: use the drafter of this model.")

    @property
    def token_embeddings(self) -> torch.Tensor:
        """Embeddings (V, dim) of image tokens."""
        return self.embed_tokens.weight if self.config.own_embeddings else self.read_tokens

    @torch.no_grad()
    def read_embeddings(self, target: LlamaGen) -> None:
        """Copies the token embeddings of the target, unless the drafter has its own.

        Raises:
            StudioError: a target of other sizes.
        """
        if not self.config.own_embeddings:
            self.check_target(target)
            self.read_tokens.copy_(target.tok_embeddings.weight)

    @classmethod
    def for_target(cls, target: LlamaGen, **config: Any) -> "Drafter":
        """An untrained drafter with the sizes and embeddings of a target; `config` overrides sizes."""
        same = "vocab_size dim num_heads num_kv_heads ffn_dim grid_size row_length rope_base prefix_rope"
        sizes = {name: target.config[name] for name in same.split()}
        sizes |= {"prefix_length": target.prefix_length, "reads_plan": bool(target.config.plan_size)}
        drafter = cls(**{**sizes, **config}, own_embeddings=False)
        drafter.read_embeddings(target)
        return drafter.to(target.device, target.dtype)

    def rope(self) -> torch.Tensor:
        """The rotary table (prefix - 1 + image tokens, head_dim // 2, 2), float32, built once per device."""
        if self._rope is None or self._rope.device != self.fc.weight.device:
            sizes = self.config
            head_dim = sizes.dim // sizes.num_heads
            table = rope_table(
                sizes.grid_size, head_dim, sizes.prefix_length - 1, sizes.rope_base, sizes.prefix_rope, sizes.row_length
            )
            self._rope = table.to(self.fc.weight.device)
        return self._rope

    def region_conditioning(self, regions: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the blocks' inputs, from the target's region conditioning (rows, T + image tokens, dim).

        Position i gets that of position i + 1, through the same weights as the embedding of its token. None without.
        """
        if regions is None or not self.config.reads_plan:
            return None
        return F.linear(regions[:, 1:], self.fc.weight[:, : self.config.dim])

    def forward(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        valid: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predictions (rows, n, dim) of the target's states 1 to n.

        Args:
            tokens: tokens 1 to n, (rows, n), int64; those of prefix positions are 0.
            states: the target's states 0 to n - 1, (rows, n, dim).
            valid: (rows, T), false at padding of the prefix.
            regions: the target's region conditioning, (rows, T + image tokens, dim).
        """
        rows, n = tokens.shape
        mask = None
        if valid is not None:
            mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril().repeat(rows, 1, 1)
            mask[:, :, : valid.shape[1]] &= valid[:, None, :n]
            mask.diagonal(dim1=1, dim2=2).fill_(True)
            mask = mask[:, None]
        x, regions = self._inputs(tokens, states), self.region_conditioning(regions)
        return self._run(x if regions is None else x + regions[:, :n], self.rope()[:n], mask, None)

    def check_embeddings(self) -> None:
        """Raises a `StudioError` when `read_embeddings` is needed and was not called."""
        if self.token_embeddings[0, 0].isnan():
            raise StudioError(
                "This drafter reads the token embeddings of its model: load the two as one pipeline, "
                "or call drafter.read_embeddings(model)."
            )

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """An empty cache for `rows` sequences, with space for `pending` positions that are not kept yet."""
        sizes = self.config
        return TreeCache(
            num_layers=sizes.num_layers,
            rows=rows,
            num_kv_heads=sizes.num_kv_heads or sizes.num_heads,
            max_length=len(self.rope()) + pending,
            head_dim=sizes.dim // sizes.num_heads,
            dtype=self.dtype,
            device=self.device,
        )

    def extend_tree(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        cache: TreeCache,
        positions: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """As `forward`, but continues what each row of the cache keeps; the new positions are pending there.

        Args:
            tokens, states: as of `forward`.
            cache: from `new_tree_cache`.
            positions: (rows, n); those behind the last image token have its rotary position.
            visible: as of `TreeCache.tree_mask`.

        Returns:
            Predictions (rows, n, dim).
        """
        table = self.rope()
        positions = positions.clamp(max=len(table) - 1)
        x = cache.add_region_conditioning(self._inputs(tokens, states), positions)
        out = self._run(x, table[positions], cache.tree_mask(visible), cache)
        cache.advance(tokens.shape[1])
        return out

    def _inputs(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat((F.embedding(tokens, self.token_embeddings).to(states.dtype), states), dim=-1))

    def _run(
        self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, cache: TreeCache | None
    ) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index)
        return x
