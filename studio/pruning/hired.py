"""HiRED: keep what the CLS token looks at, with a budget for each crop.

"HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models" (AAAI 2025,
arXiv:2408.10945). A share alpha of the budget goes to the thumbnail. The rest is divided among the crops in proportion
to c_i, how many of the thumbnail's most attended tokens (CLS attention of the first layer) lie in the region of crop i:

    b_i = c_i / sum c * (1 - alpha) * budget

and every partition keeps its b_i most attended tokens (CLS attention of the layer that makes the features).

Deviations from the authors' code, each with its reason:
- the region of a crop is its true cell of the thumbnail; theirs cuts the flat map into stripes, right for one column;
- padding is never chosen, caps are the valid tokens, and what rounding or a cap cuts off goes to other partitions, so
  that the budget is met exactly; theirs loses it;
- newlines count and stay with their rows by default; theirs drops them all, even when everything is kept.
"""

import torch

from studio.checks import check_choice, check_number
from studio.pruning.attention import Attention, scores_for
from studio.pruning.budget import apportion, count, fraction
from studio.pruning.layout import Layout, layout_for
from studio.pruning.newlines import check_newline, with_newlines

CELLS = ("blocks", "stripes")


def hired(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
    reference: bool = False,
    alpha: float | str = 0.5,
    cells: str | None = None,
) -> torch.Tensor:
    """Keeps the tokens of one image that the CLS token looks at.

    Args:
        features: (T, D), what the language model receives for the image; only T is used.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention: with `first` and `last`; `first` is not needed without crops.
        layout: partitions, grid and newlines; without one all tokens are one partition.
        generator: not needed.
        newline: "row", "keep" or "drop" (see `with_newlines`).
        reference: the authors' selection: the fraction counts padding and no newlines, budgets are cut off in float32,
            newlines are dropped.
        alpha: the thumbnail's share of the budget, in [0, 1], or "proportional", its share of all content tokens.
        cells: "blocks", the true region of each crop, or "stripes", as the authors' code cuts it; `None` is "stripes"
            for `reference` and "blocks" otherwise.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1, unless `reference`.

    Raises:
        StudioError: missing attention, or a budget, layout, newline, alpha or cells that does not fit.
    """
    layout = layout_for(features, layout)
    check_newline(newline, compete=False)
    cells = cells or ("stripes" if reference else "blocks")
    check_choice("cells", cells, CELLS)
    if alpha == "proportional":
        alpha = len(layout.region(0)) / len(layout.content)
    alpha = check_number("alpha, the thumbnail's share of the budget,", alpha, 0, 1)
    budgeted = count(fraction(budget) if reference else budget, len(features))
    if budgeted == len(features) and not reference:
        return torch.arange(len(features), device=features.device)
    last = scores_for("HiRED", "last", attention, layout)
    first = scores_for("HiRED", "first", attention, layout)[0] if layout.grid else last[0]
    if reference:
        return _reference(first, last, fraction(budget), layout, alpha, cells).to(features.device)
    regions = [layout.region(partition) for partition in range(layout.partitions)]
    by_attention = [
        region[last[partition, layout.token[region]].argsort(descending=True, stable=True)]
        for partition, region in enumerate(regions)
    ]
    hits = crop_hits(first, layout.size, layout.grid, alpha, cells).tolist() if layout.grid else []
    caps = [len(region) for region in regions]

    def pick(tokens: int) -> torch.Tensor:
        crops = apportion(tokens - min(int(tokens * alpha), caps[0]), [float(hit) for hit in hits], caps[1:])
        budgets = [min(tokens - sum(crops), caps[0]), *crops]
        return torch.cat([order[:most] for order, most in zip(by_attention, budgets)])

    return with_newlines(pick, budgeted, layout, newline).to(features.device)


def crop_hits(
    first: torch.Tensor, size: tuple[int, int], grid: tuple[int, int], alpha: float = 0.5, cells: str = "blocks"
) -> torch.Tensor:
    """How many of the int(N * (1 - alpha)) most attended tokens of the thumbnail lie in each crop's region.

    Args:
        first: (N,) CLS attention of the thumbnail in the first layer.
        size: height and width of a partition in tokens.
        grid: rows and columns of crops.
        alpha, cells: as in `hired`.

    Returns:
        (crops,) long, row by row.
    """
    number = len(first)
    top = first.argsort(descending=True, stable=True)[: int(number * (1 - alpha))]
    crops = grid[0] * grid[1]
    region = cell_of(size, grid) if cells == "blocks" else torch.arange(number) * crops // number
    return torch.bincount(region[top], minlength=crops)


def cell_of(size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """(N,) the crop, counted from 0, whose region of the thumbnail holds each of its tokens."""
    (height, width), (rows, columns) = size, grid
    row = (torch.arange(height) // max(height // rows, 1)).clamp(max=rows - 1)
    column = (torch.arange(width) // max(width // columns, 1)).clamp(max=columns - 1)
    return (row[:, None] * columns + column).flatten()


def reference_budgets(hits: torch.Tensor, tokens: int, ratio: float, alpha: float = 0.5) -> torch.Tensor:
    """The authors' budgets (P,): thumbnail, then crops; float32 products cut off, what a cap of `tokens` cuts is lost.

    Args:
        hits: (crops,) from `crop_hits`.
        tokens: N, the tokens of a partition.
        ratio: the fraction of all P * N tokens, padding included.
        alpha: as in `hired`.
    """
    total = int((1 + len(hits)) * tokens * ratio)
    thumbnail = min(int(total * alpha), tokens)
    rest = min(total - thumbnail, len(hits) * tokens)
    crops = (hits.float() / hits.sum().float() * rest).long().clamp(max=tokens)
    return torch.cat((torch.tensor([thumbnail]), crops))


def reference_masks(last: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """(P, N) bool: the budgets[p] most attended tokens of last (P, N) in each partition."""
    masks = torch.zeros_like(last, dtype=torch.bool)
    for mask, scores, budget in zip(masks, last, budgets.tolist()):
        mask[scores.topk(budget).indices] = True
    return masks


def _reference(first, last, ratio, layout, alpha, cells) -> torch.Tensor:
    if layout.grid:
        hits = crop_hits(first, layout.size, layout.grid, alpha, cells)
        budgets = reference_budgets(hits, last.shape[1], ratio, alpha)
    else:
        budgets = torch.tensor([int(last.shape[1] * ratio)])
    masks = reference_masks(last, budgets)
    content = layout.content
    return content[masks[layout.partition[content], layout.token[content]]]
