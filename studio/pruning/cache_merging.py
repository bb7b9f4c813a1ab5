"""Merging in the KV cache: image tokens that go leave a part of their keys and values in those that stay.

Both methods work for each head of a layer on the keys and values of one prompt's image tokens. A token that stands for
n others counts as n in later attention: log n is added to its logit, so that merging equal tokens changes nothing.
Keys are merged as they are in the cache, rotated to their positions.

- `ems`: "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression" (arXiv:2412.08521). The `wanted`
  tokens of the largest score are centres, the next twice as many candidates, the rest goes. A candidate joins the
  centre with which it has the largest redundancy  R = max(cos k, 0) max(cos v, 0),  or none where R is below a
  threshold. Means are weighted by the scores; directions and norms of keys are averaged apart.
- `lookm`: "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference"
  (arXiv:2406.18139). Tokens with the most attention stay; each other one joins the token with the most similar key.
  Text goes last in the paper and always stays here, so that its latest tokens, half of the paper's budget, are there.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from studio.checks import check_choice, check_flag, check_number

MERGES = ("pivot", "average", "weighted")
_CANDIDATES = 2  # for each centre


@dataclass(frozen=True, eq=False)
class Merged:
    """What each head keeps of N image tokens.

    Args:
        kept: (H, n) long, places among them, ascending.
        keys, values: (H, n, D), after merging.
        counts: (H, n) float32, how many tokens each one stands for.
    """

    kept: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor


def ems(
    keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, wanted: int, *, threshold: float = 0.6
) -> Merged:
    """Evicts, then merges into centres that are redundant with a token.

    Args:
        keys, values: (H, N, D).
        scores: (H, N), at least 0: the larger of attention from all later queries, brought to the mean of the other,
            and attention from the latest (`snapkv`).
        wanted: tokens to keep, at most N.
        threshold: the least redundancy of a merge, at least 0; above 1 nothing is merged.

    Raises:
        StudioError: a threshold below 0.
    """
    threshold = check_number("threshold, the least redundancy of a merge,", threshold, 0)
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = order[:, :wanted].sort(dim=1).values
    joins = order[:, wanted : (1 + _CANDIDATES) * wanted]
    if not joins.numel():
        return Merged(kept, _take(keys, kept), _take(values, kept), torch.ones_like(kept, dtype=torch.float32))
    redundancy = _cosines(keys, joins, kept).clamp(min=0) * _cosines(values, joins, kept).clamp(min=0)
    best, partner = redundancy.max(dim=2)
    share = scores.gather(1, joins) * (best >= threshold)
    own = scores.gather(1, kept).clamp(min=1e-12)
    weight = own.scatter_add(1, partner, share)

    def mean(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        total = _take(rows, kept) * own[..., None]
        return _add(total, partner, _take(rows, joins) * share[..., None]) / weight[..., None]

    length = keys.float().norm(dim=2, keepdim=True)
    merged = F.normalize(mean(keys / length.clamp(min=1e-12)), dim=2) * mean(length)
    counts = torch.ones_like(own).scatter_add(1, partner, (best >= threshold).to(own.dtype))
    return Merged(kept, merged.to(keys.dtype), mean(values).to(values.dtype), counts)


def lookm(
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    wanted: int,
    *,
    merge: str = "pivot",
    merge_keys: bool = True,
) -> Merged:
    """Keeps the tokens with the most attention and merges every other one into the most similar of them.

    Args:
        keys, values: (H, N, D).
        scores: (H, N), attention received from all queries.
        wanted: tokens to keep, at most N.
        merge: "average" of a token c and those e that join it, (c + sum e) / (1 + n); "pivot", which takes e half way
            to c first; or "weighted", which takes e times its cosine with c.
        merge_keys: whether keys are merged, too; they are rotated to different positions.

    Raises:
        StudioError: an unknown merge.
    """
    check_choice("merge", merge, MERGES)
    merge_keys = check_flag("merge_keys", merge_keys)
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept, joins = order[:, :wanted].sort(dim=1).values, order[:, wanted:]
    counts = torch.ones_like(kept, dtype=torch.float32)
    if not joins.numel():
        return Merged(kept, _take(keys, kept), _take(values, kept), counts)
    similarity, partner = _cosines(keys, joins, kept).max(dim=2)
    counts = counts.scatter_add(1, partner, torch.ones_like(similarity))

    def merged(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        centres, others = _take(rows, kept), _take(rows, joins)
        if merge == "pivot":
            others = (others + _take(centres, partner)) / 2
        elif merge == "weighted":
            others = others * similarity[..., None]
        return _add(centres, partner, others) / counts[..., None]

    held = merged(keys).to(keys.dtype) if merge_keys else _take(keys, kept)
    return Merged(kept, held, merged(values).to(values.dtype), counts)


def _take(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(H, n, D) out of (H, N, D), by places (H, n)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))


def _add(centres: torch.Tensor, partner: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Centres (H, n, D) plus the others (H, m, D) that join each, by partner (H, m)."""
    return centres.scatter_add(1, partner[..., None].expand(-1, -1, centres.shape[-1]), others)


def _cosines(rows: torch.Tensor, joins: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(H, m, n) float32."""
    unit = F.normalize(rows.float(), dim=2, eps=1e-12)
    return _take(unit, joins) @ _take(unit, kept).transpose(1, 2)
