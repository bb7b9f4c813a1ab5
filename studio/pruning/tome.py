"""Merging of tokens inside the vision tower: "Token Merging: Your ViT But Faster" (ToMe, arXiv:2210.09461).

Behind the attention of a layer, the tokens at even places look for the token at an odd place whose key there resembles
theirs most; the pairs that are most alike become one token, their mean weighted by size. No training is needed.
`studio.pruning.merging` has what is around that.

Deviations from the paper: the number of merged tokens may differ from layer to layer; order is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F

from studio.pruning.merging import Counts, Merging, Stepped, mean_of_heads, without


def merge(x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor, count: int, first: int) -> Stepped:
    """Merge the `count` tokens at even places that resemble one at an odd place most into that one.

    Args:
        x: tokens (B, n, C).
        keys: (B, n, D), by whose cosine tokens are compared.
        sizes: patches in each token, (B, n), floating-point.
        count: from 1 to the number of even places.
        first: the first even place: 0, or 2 behind a CLS token, which never moves.

    Returns:
        Tokens (B, n - count, C) in their order, their sizes, and the new place (B, n) of each token that there was.
    """
    directions = F.normalize(keys.float(), dim=-1)
    alike, nearest = (directions[:, first::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=2)
    chosen = alike.topk(count, dim=1).indices
    return without(x, sizes, first + 2 * chosen, 1 + 2 * nearest.gather(1, chosen))


class ToMe(Merging):
    """ToMe in a tower; the numbers are those of merged tokens."""

    def __init__(self, tower: Any, merged: Counts, **of_tower: Any):
        super().__init__(tower, merged, **of_tower)

    @property
    def first(self) -> int:
        """The first even place that may move: CLS never does."""
        return 2 if self.has_cls else 0

    def most(self, tokens: int) -> int:
        return len(range(self.first, tokens, 2))

    def step(
        self, x: torch.Tensor, sizes: torch.Tensor, counts: tuple[int, ...], attention: Any, **seen: torch.Tensor
    ) -> Stepped:
        return merge(x, mean_of_heads(seen["k_proj"], attention.num_heads), sizes, counts[0], self.first)
