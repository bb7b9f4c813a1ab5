"""SCOPE: tokens that cover the others and that the vision tower attends to.

"SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs" (arXiv:2510.24214). With the attention a
that a token gets in the layer that makes the features, each pick has the largest

    a_u * gain(u),   gain(u) = sum_v max(0, cos(v, u) - best_v),   best_v = max over chosen c of cos(v, c), at first 0.

`coverage` is the gain alone, a greedy maximisation of a submodular function of the features: the chosen set is within
1 - 1/e of the best of its size.

Written from the paper.
"""

import torch
import torch.nn.functional as F

from studio.pruning.attention import Attention, scores_for
from studio.pruning.layout import Layout, layout_for
from studio.pruning.newlines import in_order


def coverage(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
) -> torch.Tensor:
    """Keeps the tokens to which the others are nearest.

    Args:
        features: (T, D), what the language model receives for the image.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention, generator: not needed.
        layout: where the newlines are; without one there are none.
        newline: "row", "keep" or "drop" (see `with_newlines`).

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: a budget, layout or newline that does not fit.
    """
    return in_order(features, budget, layout, newline, lambda places, picks: coverage_order(features[places], picks))


def scope(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
) -> torch.Tensor:
    """Keeps tokens to which the others are near and which the vision tower attends to.

    Arguments and result as of `coverage`, with `last` of the attention.

    Raises:
        StudioError: missing attention, or a budget, layout or newline that does not fit.
    """
    layout = layout_for(features, layout)

    def order(places: torch.Tensor, picks: int) -> torch.Tensor:
        last = scores_for("SCOPE", "last", attention, layout)
        salient = last[layout.partition.clamp(min=0), layout.token.clamp(min=0)].to(features.device)
        return coverage_order(features[places], picks, salient[places])

    return in_order(features, budget, layout, newline, order)


def coverage_order(features: torch.Tensor, picks: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Greedy coverage of features (N, D): `picks` different rows in the order they are chosen, at most N.

    Args:
        weights: (N,) factors of the gains; ones when `None`. Of equal gains the first row wins.
    """
    rows = F.normalize(features.detach().float(), dim=1, eps=1e-12)
    return greedy_coverage(rows @ rows.T, picks, weights)


def greedy_coverage(matrix: torch.Tensor, picks: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Columns of a matrix (rows, N) whose largest entries of each row add up to the most, picked one by one.

    Gains are carried from pick to pick. On a CPU only rows whose largest entry has changed are read again; a GPU reads
    all, so that nothing waits for it.
    """
    best, gains, order = matrix.new_zeros(len(matrix)), matrix.clamp(min=0).sum(dim=0), []
    chosen = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    for _ in range(min(picks, matrix.shape[1])):
        weighted = gains if weights is None else gains * weights
        pick = weighted.masked_fill(chosen, -torch.inf).argmax(dim=0, keepdim=True)
        order.append(pick)
        chosen[pick] = True
        better = torch.maximum(best, matrix.index_select(1, pick)[:, 0])
        rows = (better > best).nonzero()[:, 0] if matrix.device.type == "cpu" else slice(None)
        part, before, after = matrix[rows], best[rows, None], better[rows, None]
        gains = gains - ((part - before).clamp(min=0) - (part - after).clamp(min=0)).sum(dim=0)
        best = better
    return torch.cat(order)
