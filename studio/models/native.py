"""LlamaGen for drawing tokens on a CPU, compiled from C on first use (`native.c`, `native_blocks`).

Where there is no compiler, `is_available` is false, and `studio.models.packed` is the next best.
"""

import weakref

import torch
import torch.nn.functional as F

from studio.errors import StudioError
from studio.models.kv_cache import KVCache
from studio.models.native_blocks import NativeBlocks, NativeProduct, can_run
from studio.models.tree_cache import TreeCache


def is_available(model) -> bool:
    """Whether this model runs in C here: float32 on a CPU, sizes in eights, and a compiler that works."""
    return can_run(model, model.config.vocab_size)


class NativeLlamaGen:
    """The cached-decoding calls of `LlamaGen`, for single tokens, several, and trees; results differ by rounding only.

    Errors: `StudioError` for a model that `is_available` refuses.
    """

    @torch.no_grad()
    def __init__(self, model):
        if not is_available(model):
            raise StudioError(
                "Native decoding needs a float32 model on the CPU with sizes divisible by 8, and a C compiler (cc) "
                "on the path; leave out weights to use what works here."
            )
        self._model = weakref.ref(model)
        self.prefix_length, self.num_tokens, self.config = model.prefix_length, model.num_tokens, model.config
        self.device = model.device
        self._blocks = NativeBlocks(model, model.norm.weight)
        self.logits = NativeProduct(model.output.weight)
        self._embedding = model.tok_embeddings.weight.detach()

    @property
    def model(self):
        return self._model()

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads."""
        return self._blocks.weight_bytes + self.logits.weight.nbytes

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for `rows` sequences."""
        return self.model.new_cache(rows)

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """As of `LlamaGen`."""
        return self.model.new_tree_cache(rows, pending)

    def prefill(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Stores the prefix (rows, T, dim) in an empty cache; logits (rows, V) of the first image token."""
        return self.logits(self.prefill_states(prefix, valid, cache)[:, -1])

    def prefill_states(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """`prefill`, but the states (rows, T, dim) of all prefix positions."""
        rows, length, _ = prefix.shape
        mask = self.model.prefix_mask(valid, length)
        states = self._run(self.model.begin(prefix, cache), cache, None if mask is None else mask[:, 0])
        if valid is not None:
            cache.mask_prefix(valid)
        return states

    def extend(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Feeds tokens (rows, n) behind what the cache holds; logits (rows, n, V) of the tokens after them."""
        return self.logits(self._run(cache.with_plan(F.embedding(tokens, self._embedding)), cache, None))

    def extend_tree(
        self, tokens: torch.Tensor, cache: TreeCache, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """As of `LlamaGen`: states (rows, n, dim) of trees of tokens (rows, n), pending in the cache."""
        x = cache.with_plan(F.embedding(tokens, self._embedding), positions)
        return self._blocks(x, cache, positions, visible)

    def _run(self, x: torch.Tensor, cache: KVCache, visible: torch.Tensor | None) -> torch.Tensor:
        """States (rows, n, dim) of positions that follow one another."""
        rows, n, _ = x.shape
        return self._blocks(x, cache, torch.arange(cache.length, cache.length + n).expand(rows, n), visible)
