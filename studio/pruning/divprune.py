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

With `centred`, "Centering before Pruning" (arXiv:2608.30263): mean features make all cosines alike, so they are taken
out of the distances, and each distance is weighted by how unlike the others a token is.
"""

import numpy as np
import torch
import torch.nn.functional as F

from studio.checks import check_flag
from studio.pruning.attention import Attention
from studio.pruning.layout import Layout
from studio.pruning.newlines import check_newline, in_order

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
    centred: bool = False,
) -> torch.Tensor:
    """Keeps the most diverse tokens of one image.

    Args:
        features: (T, D), what the language model receives for the image.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention: with `unmerged` for `centred` on a Qwen tower; else not needed.
        generator: not needed.
        layout: where the newlines are; without one there are none.
        newline: "row", "keep", "drop" (see `with_newlines`) or "compete" (newlines are tokens like any other).
        reference: the authors' selection: newlines compete.
        centred: Cen-Prune: distances of centred features, weighted by how unlike all others a token is.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: a budget, layout or newline that does not fit.
    """
    if reference:
        check_newline(newline, compete=True)
        newline = "compete"
    if not check_flag("centred", centred):

        def plain(places: torch.Tensor, picks: int) -> torch.Tensor:
            return diverse_order(features[places], picks)

        return in_order(features, budget, layout, newline, plain, compete=True)
    unmerged = None if attention is None else attention.unmerged
    rows = features if unmerged is None else unmerged.to(features.device)

    def order(places: torch.Tensor, picks: int) -> torch.Tensor:
        return centred_order(rows[places], picks, scaled=unmerged is not None)

    return in_order(features, budget, layout, newline, order, compete=True)


def diverse_order(features: torch.Tensor, picks: int) -> torch.Tensor:
    """Greedy max-min diversity: `picks` different rows of features (M, D), in the order they are chosen.

    The first picks do not depend on how many follow. Of equal distances the first row wins.
    """
    rows = F.normalize(features.detach().float(), dim=1, eps=1e-12).nan_to_num()
    if len(rows) > _LARGEST_MATRIX:
        return _order_from_rows(rows, picks)
    return order_from_similarities(similarities(rows), picks)


def centred_order(features: torch.Tensor, picks: int, *, scaled: bool = False) -> torch.Tensor:
    """Greedy max-min diversity of centred features (Cen-Prune): `picks` rows of (M, D), in the order they are chosen.

    Distances are those of y - mean y; each is multiplied by the token's weight, how unlike the others it is before
    centring, brought to (0, 1).

    Args:
        scaled: divide each channel by its standard deviation and bring weights to (0, 1) by a sigmoid, as for features
            before the merger of Qwen; by default y = x, and by minimum and maximum.
    """
    rows = features.detach().float()
    if scaled:
        rows = rows / (rows.var(dim=0, correction=0) + 1e-6).sqrt()
    alone = F.normalize(rows, dim=1, eps=1e-12)
    weight = (1 - len(rows) * alone @ alone.mean(dim=0)) / max(len(rows) - 1, 1)
    if scaled:
        weight = torch.sigmoid((weight - weight.mean()) / (weight.std(correction=0) + 1e-6))
    else:
        weight = (weight - weight.min()) / (weight.max() - weight.min() + 1e-6)
    distance = 1 - similarities(F.normalize(rows - rows.mean(dim=0), dim=1, eps=1e-12))
    pick = distance.fill_diagonal_(torch.inf).amin(dim=1).argmax(dim=0, keepdim=True)
    order, farthest = [pick], distance.fill_diagonal_(0).index_select(0, pick)[0]
    chosen = torch.zeros_like(farthest, dtype=torch.bool)
    for _ in range(picks - 1):
        chosen[order[-1]] = True
        pick = (weight * farthest).masked_fill(chosen, -torch.inf).argmax(dim=0, keepdim=True)
        order.append(pick)
        farthest = torch.minimum(farthest, distance.index_select(0, pick)[0])
    return torch.cat(order)


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
