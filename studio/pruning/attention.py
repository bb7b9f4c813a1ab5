"""How much a vision tower looks at each token: rows of its attention, from the queries and keys of one layer.

Nothing here needs `output_attentions` or the eager backend: only the row that is asked for is computed, in float32.
"""

from dataclasses import dataclass

import torch

from studio.errors import StudioError

_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Attention:
    """Scores of the tokens of one image, each (P, N): P partitions (0 the thumbnail) of N tokens.

    Args:
        first: attention of the CLS token in the first layer, after softmax, summed over heads (HiRED).
        last: the same in the layer whose output becomes the features (HiRED).
        logits: query-key products of the CLS token in the last layer, before softmax, mean over heads (GlobalCom2).
    """

    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def cls_logits(queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None) -> torch.Tensor:
    """Scaled products of the CLS query with every other key, before softmax, mean over heads.

    Args:
        queries: (P, any number, D) projections; only the first, of the CLS token, is used.
        keys: (P, 1 + N, D) projections, CLS first.
        heads: attention heads.
        scale: factor of the queries; 1 / sqrt(D / heads) when `None`.

    Returns:
        (P, N) float32.

    Errors: `StudioError` when heads do not divide D or the shapes differ.
    """
    return _first_rows(queries, keys, heads, scale).mean(dim=1)[:, 1:]


def cls_probabilities(
    queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None
) -> torch.Tensor:
    """Attention of the CLS token to every other, summed over heads; arguments and result as in `cls_logits`.

    The softmax runs over all keys, CLS included; its column is dropped afterwards.
    """
    return _first_rows(queries, keys, heads, scale).softmax(dim=-1).sum(dim=1)[:, 1:]


def received_attention(
    queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None
) -> torch.Tensor:
    """Attention each token receives, mean over all queries and heads: a stand-in for CLS where a tower has none.

    Computed in blocks of queries, so that memory grows with N and not with its square.

    Args:
        queries, keys: (P, N, D) projections, rotated where the tower does so.
        heads: attention heads.
        scale: factor of the queries; 1 / sqrt(D / heads) when `None`.

    Returns:
        (P, N) float32; each row adds up to 1.

    Errors: `StudioError` when heads do not divide D or the shapes differ.
    """
    queries, keys = _by_head(queries, heads), _by_head(keys, heads)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    received = keys.new_zeros(keys.shape[0], keys.shape[2])
    for block in queries.split(_BLOCK, dim=2):
        received += (block * scale @ keys.transpose(-1, -2)).softmax(dim=-1).sum(dim=(1, 2))
    return received / (heads * queries.shape[2])


def mean_query_logits(
    queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None
) -> torch.Tensor:
    """Products of the mean query with every key, before softmax, mean over heads: `cls_logits` without a CLS token.

    Arguments and result as in `received_attention`; the values may be negative.
    """
    return _first_rows(queries.float().mean(dim=1, keepdim=True), keys, heads, scale).mean(dim=1)


def _by_head(projections: torch.Tensor, heads: int) -> torch.Tensor:
    if projections.dim() != 3 or projections.shape[-1] % heads:
        raise StudioError(f"Give projections as (P, N, D) with D divisible by {heads} heads.")
    return projections.float().unflatten(-1, (heads, -1)).transpose(1, 2)


def _first_rows(queries, keys, heads, scale) -> torch.Tensor:
    queries, keys = _by_head(queries[:, :1], heads), _by_head(keys, heads)
    if queries.shape[0] != keys.shape[0] or queries.shape[-1] != keys.shape[-1]:
        raise StudioError("Queries and keys must be of the same partitions and width.")
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return (queries * scale @ keys.transpose(-1, -2)).squeeze(2)


def scores_for(method: str, name: str, attention: Attention | None, layout) -> torch.Tensor:
    """The scores `name` of an `Attention`, (P, N) float32 on the CPU, for the partitions of `layout`.

    Errors: `StudioError` when they are missing, of another shape, or the layout has lost its grid.
    """
    scores = getattr(attention, name, None)
    if scores is None:
        raise StudioError(f"{method} needs attention: give attention=Attention({name}=...).")
    if layout.partition.max() >= layout.partitions:
        raise StudioError(f"{method} needs crops as the vision tower made them, but here the model shrank them.")
    expected = (layout.partitions, layout.size[0] * layout.size[1])
    if tuple(scores.shape) != expected:
        raise StudioError(f"{method} needs scores of shape {expected} for this layout, not {tuple(scores.shape)}.")
    return scores.detach().float().cpu()
