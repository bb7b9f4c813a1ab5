"""A `Drafter` compiled from C on first use (`native_blocks`), for processors.

Half of what it reads, the token's embedding, is multiplied in advance: a row of a table stands for it.
"""

import weakref

import torch
import torch.nn.functional as F

from studio.models.native_blocks import NativeBlocks, NativeProduct
from studio.models.tree_cache import TreeCache


class NativeDrafter:
    """The cached calls of a `Drafter` that `native_blocks.can_run`; results differ by rounding only."""

    @torch.no_grad()
    def __init__(self, drafter):
        self._drafter, self.config = weakref.ref(drafter), drafter.config
        by_token, by_state = drafter.fc.weight.chunk(2, dim=1)
        self._tokens = F.linear(drafter.token_embeddings, by_token, drafter.fc.bias)
        self._states = NativeProduct(by_state)
        self._blocks = NativeBlocks(drafter, norm=None)

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """As of `Drafter`."""
        return self._drafter().new_tree_cache(rows, pending)

    def extend_tree(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        cache: TreeCache,
        positions: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """As of `Drafter`."""
        x = self._states(states).add_(F.embedding(tokens, self._tokens))
        if cache.plan is not None:
            x = cache.with_plan(x, positions.clamp(max=cache.plan.shape[1] - 1))
        return self._blocks(x, cache, positions, visible)
