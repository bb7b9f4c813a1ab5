"""GlobalCom2: the thumbnail decides how much each crop keeps, and helps to decide what.

"Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language Models"
(AAAI 2026, arXiv:2501.05179). z[p] are products of the CLS query with the keys of partition p in the last layer, before
softmax. The thumbnail keeps the fraction r with the largest z[0]. Crop i, with S_i the sum of z[0] over its region,
keeps

    rho_i = min(r (1 + w_i - mean w), 1),   w = softmax(S / tau)

of its tokens, those with the largest  z[i] / ||z[i]|| + G_i / ||G_i||,  where G is z[0] scaled up to the canvas.

Deviations from the authors' code, each with its reason:
- a chosen token keeps its true place; theirs takes places among the valid tokens of a crop for places in the whole
  crop, which shifts and reorders tokens where there is padding;
- the thumbnail stays in its order; theirs feeds it by descending score, which scrambles positions;
- the budget is met exactly: what clipping and rounding cut off goes to other partitions; a fraction of 1 keeps all;
- newlines count and stay with their rows by default; theirs keeps all, those of padding too.
"""

import torch
import torch.nn.functional as F

from studio.checks import check_choice, check_number
from studio.pruning.attention import Attention, scores_for
from studio.pruning.budget import apportion, count, fraction
from studio.pruning.hired import cell_of
from studio.pruning.layout import Layout, layout_for
from studio.pruning.newlines import check_newline, with_newlines

POOLS = ("sum", "mean")
FIELDS = {"logits": "logits", "feature": "last"}


def globalcom2(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
    reference: bool = False,
    tau: float = 10.0,
    pool: str = "sum",
    scores: str = "logits",
) -> torch.Tensor:
    """Keeps the tokens of one image that matter in the thumbnail and in their crop.

    Args:
        features: (T, D), what the language model receives for the image; only T is used.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention: with `logits`, or with `last` for scores="feature".
        layout: partitions, grid and newlines; without one all tokens are one partition.
        generator: not needed.
        newline: "row", "keep" or "drop" (see `with_newlines`).
        reference: the authors' selection: the fraction counts content alone, clipped and rounded budgets are lost, all
            newlines stay.
        tau: temperature of the softmax over crops, above 0.
        pool: "sum" of z[0] over a region (the paper; nearly one crop takes all) or "mean", which does not grow with the
            number of tokens.
        scores: "logits" of the last layer (the paper) or "feature", CLS attention of the layer whose output becomes the
            features: what the language model reads. Attention is at most 1, so give it a tau of its own.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1, unless `reference`.

    Raises:
        StudioError: missing attention, or a budget, layout, newline, tau, pool or scores that does not fit.
    """
    check_choice("scores", scores, tuple(FIELDS))
    layout = layout_for(features, layout)
    check_newline(newline, compete=False)
    budgeted = count(fraction(budget) if reference else budget, len(features))
    if budgeted == len(features) and not reference:
        return torch.arange(len(features), device=features.device)
    logits = scores_for("GlobalCom2", FIELDS[scores], attention, layout)
    regions = [layout.region(partition) for partition in range(layout.partitions)]
    caps = [len(region) for region in regions]
    ranked = [logits[0, layout.token[regions[0]]], *crop_scores(logits, layout)]
    by_score = [region[score.argsort(descending=True, stable=True)] for region, score in zip(regions, ranked)]

    def ratios(r: float) -> list[float]:
        return [r, *crop_ratios(logits[0], layout.size, layout.grid, r, tau, pool).tolist()] if layout.grid else [r]

    if reference:
        budgets = [int(cap * ratio) for cap, ratio in zip(caps, ratios(fraction(budget)))]
        kept = torch.cat([order[:most] for order, most in zip(by_score, budgets)])
        return torch.cat((kept, layout.newlines)).sort().values.to(features.device)

    def pick(tokens: int) -> torch.Tensor:
        weights = [cap * ratio for cap, ratio in zip(caps, ratios(tokens / sum(caps)))]
        return torch.cat([order[:most] for order, most in zip(by_score, apportion(tokens, weights, caps))])

    return with_newlines(pick, budgeted, layout, newline).to(features.device)


def crop_ratios(
    thumbnail: torch.Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    ratio: float,
    tau: float = 10.0,
    pool: str = "sum",
) -> torch.Tensor:
    """rho, the fraction each crop keeps.

    Args:
        thumbnail: (N,) z[0].
        size: height and width of a partition in tokens.
        grid: rows and columns of crops.
        ratio: r, in (0, 1].
        tau, pool: as in `globalcom2`.

    Returns:
        (crops,) float64, row by row; their mean is r unless one is clipped at 1.

    Raises:
        StudioError: a tau that is not above 0 and an unknown pool.
    """
    tau = check_number("tau", tau, above=True)
    check_choice("pool", pool, POOLS)
    cell = cell_of(size, grid)
    sums = torch.zeros(grid[0] * grid[1], dtype=torch.float64).index_add_(0, cell, thumbnail.double())
    if pool == "mean":
        sums = sums / torch.bincount(cell, minlength=len(sums))
    weights = ((sums - sums.max()) / tau).exp()
    weights = weights / (weights.sum() + 1e-8)
    return (ratio * (1 + weights - weights.mean())).clamp(max=1)


def thumbnail_on_canvas(thumbnail: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """z[0], (N,), scaled bilinearly to the canvas without padding: the values at each crop's tokens, in their order."""
    crops = [layout.region(partition) for partition in range(1, layout.partitions)]
    places = torch.cat(crops) if crops else torch.empty(0, dtype=torch.long)
    if not len(places):
        return [thumbnail[:0] for _ in crops]
    row, column = layout.row[places], layout.column[places]
    top, left = row.min(), column.min()
    canvas = (int(row.max() - top) + 1, int(column.max() - left) + 1)
    scaled = F.interpolate(thumbnail.view(1, 1, *layout.size), size=canvas, mode="bilinear", align_corners=False)[0, 0]
    return [scaled[layout.row[crop] - top, layout.column[crop] - left] for crop in crops]


def crop_scores(logits: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """The scores of each crop's tokens, from z (P, N): own and scaled-up thumbnail, both of norm 1."""
    return [
        F.normalize(own[layout.token[layout.region(crop)]], dim=0) + F.normalize(shared, dim=0)
        for crop, (own, shared) in enumerate(zip(logits[1:], thumbnail_on_canvas(logits[0], layout)), start=1)
    ]
