"""DivPrune: keep the tokens that differ most from one another.

"DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025, arXiv:2503.02175): the kept
set maximises the smallest pairwise distance (the max-min diversity problem), found greedily, with the distance
d(i, j) = 1 - cos(x_i, x_j):

    first pick:  argmax_i  min_{j != i} d(i, j)
    pick t:      argmax_i  min_{c chosen} d(i, c)

Written from the paper. Two things make it fast without changing a pick: the distance to the nearest chosen token is
carried from pick to pick, so that a pick costs O(M) instead of O(k M); and of the symmetric similarity matrix only the
upper triangle is multiplied out. Nothing waits for the device.

Deviations from the authors' code, each with its reason:
- float32 whatever the features are: half precision changes picks;
- a zero row gets similarity 0 instead of NaN, and a chosen token is never chosen again: theirs then repeats index 0;
- at least one token is kept;
- newlines stay with their rows by default; theirs let the identical newline embeddings compete, which loses the rows.
"""

import numpy as np
import torch
import torch.nn.functional as F

from studio.pruning.attention import Attention
from studio.pruning.layout import Layout, check_newline, count, layout_for, with_newlines

_BLOCK = 256
_LARGEST_MATRIX = 16384


def divprune(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
    reference: bool = False,
) -> torch.Tensor:
    """Keeps the most diverse tokens of one image.

    Args:
        features: (T, D), what the language model receives for the image.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention, generator: not needed.
        layout: where the newlines are; without one there are none.
        newline: "row", "keep", "drop" (see `with_newlines`) or "compete" (newlines are tokens like any other).
        reference: the authors' selection: newlines compete.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: a budget, layout or newline that does not fit.
    """
    layout = layout_for(features, layout)
    check_newline(newline, compete=True)
    budget = count(budget, len(features))
    if budget == len(features):
        return torch.arange(len(features), device=features.device)
    if reference or newline == "compete" or not len(layout.newlines):
        return diverse_order(features, budget).sort().values
    content = layout.content
    order = content[diverse_order(features[content.to(features.device)], min(budget, len(content))).cpu()]
    return with_newlines(lambda picks: order[:picks], budget, layout, newline).to(features.device)


def diverse_order(features: torch.Tensor, picks: int) -> torch.Tensor:
    """Greedy max-min diversity: `picks` different rows of features (M, D), in the order they are chosen.

    The first picks do not depend on how many follow. Of equal distances the first row wins.
    """
    rows = F.normalize(features.detach().float(), dim=1, eps=1e-12).nan_to_num()
    if len(rows) > _LARGEST_MATRIX:
        return _order_from_rows(rows, picks)
    return order_from_similarities(similarities(rows), picks)


def similarities(rows: torch.Tensor) -> torch.Tensor:
    """rows @ rows.T for rows (M, D): blocks of the upper triangle, the lower one copied."""
    matrix = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK):
        end = start + _BLOCK
        torch.mm(rows[start:end], rows[start:].T, out=matrix[start:end, start:])
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix


def order_from_similarities(matrix: torch.Tensor, picks: int) -> torch.Tensor:
    """The picks of `diverse_order` from cosine similarities (M, M), whose diagonal is overwritten."""
    matrix.fill_diagonal_(float("-inf"))
    pick = matrix.amax(dim=1).argmin(dim=0, keepdim=True)
    matrix.fill_diagonal_(float("inf"))
    if matrix.device.type == "cpu":
        return _greedy_on_cpu(int(pick), picks, matrix)
    return _greedy(pick, picks, lambda pick: matrix.index_select(0, pick)[0])


def _order_from_rows(rows: torch.Tensor, picks: int) -> torch.Tensor:
    closest = rows.new_empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK] @ rows.T
        block.diagonal(start).fill_(float("-inf"))
        closest[start : start + _BLOCK] = block.amax(dim=1)

    def row(pick):
        return (rows @ rows.index_select(0, pick)[0]).index_fill_(0, pick, float("inf"))

    return _greedy(closest.argmin(dim=0, keepdim=True), picks, row)


def _greedy(pick: torch.Tensor, picks: int, row) -> torch.Tensor:
    """The loop of the paper in similarities: a chosen token is infinitely similar to itself."""
    order, closest = [pick], row(pick)
    for _ in range(picks - 1):
        pick = closest.argmin(dim=0, keepdim=True)
        order.append(pick)
        torch.maximum(closest, row(pick), out=closest)
    return torch.cat(order)


def _greedy_on_cpu(pick: int, picks: int, matrix: torch.Tensor) -> torch.Tensor:
    """`_greedy` on the memory of the matrix: rows are so short that the calls, not the numbers, take the time."""
    rows = matrix.numpy()
    order, closest = [pick], rows[pick].copy()
    for _ in range(picks - 1):
        pick = int(closest.argmin())
        order.append(pick)
        np.maximum(closest, rows[pick], out=closest)
    return torch.tensor(order)
