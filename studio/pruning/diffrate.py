"""Pruning and merging inside the vision tower: "DiffRate: Differentiable Compression Rate for Efficient Vision
Transformers" (arXiv:2305.17997).

Behind the attention of a layer, tokens are ranked. The lowest are pruned; the lowest of the others are merged into
those of the rest that they resemble most, a mean weighted by size. How many in each layer is learned once, by `studio
train diffrate`, and then fixed.

The paper ranks by the attention that a token gets from CLS (here from all tokens in a tower without CLS). That serves
classes, which are read off CLS. A language model reads the patches instead, plain ones too, and `rank="likeness"` lets
go what is there already: a token is the lower, the more it resembles any token in front of it, so that of several equal
ones the first stays.

A pruned patch is not lost behind the tower: it has the state of the token that stays and resembles it most, in which it
does not count. `studio.pruning.merging` has what is around all that.

Deviations from the paper: `rank`; attention counts a merged token by its size.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from studio.checks import check_choice
from studio.errors import StudioError
from studio.pruning.attention import cls_probabilities, received_attention
from studio.pruning.merging import Counts, Merging, Stepped, mean_of_heads, rows_at, without

RANKS = ("attention", "likeness")
_LEARNED = ("merged", "pruned", "rank")


def with_learned(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments `merged`, `pruned` and `rank`: those given, then what was learned for a model.

    That is "diffrate" in its `config.pruning`. Given numbers replace both learned ones.

    Raises:
        StudioError: no numbers are given and none were learned, or something else stands there.
    """
    learned = (getattr(model.config, "pruning", None) or {}).get("diffrate", {})
    if not isinstance(learned, Mapping) or set(learned) not in (set(), set(_LEARNED)):
        raise StudioError(f"pruning.diffrate in config.json holds {', '.join(_LEARNED)}, and nothing else.")
    if given.keys() & {"merged", "pruned"}:
        return {"rank": learned.get("rank", RANKS[0]), **given}
    if not learned:
        raise StudioError(
            "No rates were learned for this model: give numbers of tokens, or learn them with `studio train diffrate`."
        )
    return {**learned, **given}


def cosines(keys: torch.Tensor, heads: int) -> torch.Tensor:
    """How alike tokens are, (B, n, n), by the means over heads of their keys (B, n, D)."""
    directions = F.normalize(mean_of_heads(keys, heads).float(), dim=-1)
    return directions @ directions.transpose(1, 2)


def novelty(alike: torch.Tensor) -> torch.Tensor:
    """How little each token resembles any in front of it, (B, n): minus the largest of its cosines (B, n, n) there.

    Cosines below 0 count as 0.
    """
    return -alike.tril(-1).amax(dim=2)


def shrink(
    x: torch.Tensor, sizes: torch.Tensor, scores: torch.Tensor, alike: torch.Tensor, merged: int, pruned: int
) -> Stepped:
    """Prune the tokens with the lowest scores, and merge the next into those that stay and resemble them most.

    Args:
        x: tokens (B, n, C).
        sizes: patches in each token, (B, n), floating-point.
        scores: (B, n), or (B, n - 1) behind a CLS token, which stays as it is.
        alike: how alike the tokens with scores are, (B, n, n) or (B, n - 1, n - 1).
        merged, pruned: how many; together fewer than there are scores.

    Returns:
        Tokens (B, n - merged - pruned, C) in their order, their sizes, and the new place (B, n) of each token that
        there was: for one that went, that of the token which it resembles most.
    """
    cls, stay = x.shape[1] - scores.shape[1], scores.shape[1] - merged - pruned
    order = scores.argsort(dim=1, descending=True, stable=True)
    gone = order[:, stay:]
    far = torch.zeros_like(alike[:, 0]).scatter(1, gone, -3)
    nearest = (rows_at(alike, gone) + far[:, None]).argmax(dim=2)
    return without(x, sizes, gone + cls, nearest + cls, merged)


class DiffRate(Merging):
    """DiffRate in a tower; the numbers are those of merged and of pruned tokens.

    Args:
        rank: "attention" or "likeness".
    """

    def __init__(self, tower: Any, merged: Counts = 0, pruned: Counts = 0, rank: str = "attention", **of_tower: Any):
        check_choice("rank", rank, RANKS)
        self.rank, self.reads = rank, ("k_proj",) if rank == "likeness" else ("q_proj", "k_proj")
        super().__init__(tower, merged, pruned, **of_tower)

    def most(self, tokens: int) -> int:
        return tokens - self.has_cls - 1

    def step(
        self, x: torch.Tensor, sizes: torch.Tensor, counts: tuple[int, ...], attention: Any, **seen: torch.Tensor
    ) -> Stepped:
        merged, pruned = counts
        k_proj = seen["k_proj"]
        alike = cosines(k_proj[:, int(self.has_cls) :], attention.num_heads)
        if self.rank == "likeness":
            scores = novelty(alike)
        else:
            score = cls_probabilities if self.has_cls else received_attention
            scores = score(seen["q_proj"], k_proj, attention.num_heads, attention.scale, sizes)
        return shrink(x, sizes, scores, alike, merged, pruned)
