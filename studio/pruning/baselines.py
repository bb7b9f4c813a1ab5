"""Baselines: random tokens, and a uniform grid of tokens over the thumbnail and over the crops.

Random pruning is a strong baseline (UniPruneBench).
"""

import math

import torch

from studio.errors import StudioError
from studio.pruning.attention import Attention
from studio.pruning.budget import apportion, count
from studio.pruning.layout import Layout, layout_for
from studio.pruning.newlines import check_newline, with_newlines


def uniform(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
) -> torch.Tensor:
    """Keeps a regular grid of tokens of one image.

    Thumbnail and canvas of crops get tokens in proportion to their size; in each, rows are evenly spaced and so are the
    tokens of a row, as near to squares as the number allows.

    Args:
        features: (T, D), what the language model receives for the image; only T is used.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention, generator: not needed.
        layout: the places of the tokens; without one they are a single row.
        newline: "row", "keep" or "drop" (see `with_newlines`).

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: a budget, layout or newline that does not fit.
    """
    layout = layout_for(features, layout)
    check_newline(newline, compete=False)
    budget = count(budget, len(features))
    if budget == len(features):
        return torch.arange(len(features), device=features.device)
    thumbnail, canvas = layout.region(0), (layout.partition > 0).nonzero().flatten()
    regions = [_table(region, layout) for region in (thumbnail, canvas) if len(region)]
    sizes = [table.numel() for table in regions]

    def pick(tokens: int) -> torch.Tensor:
        shares = apportion(tokens, [float(size) for size in sizes], sizes)
        return torch.cat([_lattice(table, share) for table, share in zip(regions, shares)])

    return with_newlines(pick, budget, layout, newline).to(features.device)


def _table(region: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Indices in the packed sequence as (rows, columns)."""
    rows = len(layout.row[region].unique())
    columns = len(layout.column[region].unique())
    if rows * columns != len(region):
        raise StudioError("Uniform pruning needs rows of equal length: the layout leaves out tokens.")
    order = torch.argsort(layout.row[region] * (layout.column.max() + 1) + layout.column[region])
    return region[order].view(rows, columns)


def _lattice(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Exactly `tokens` entries of table (rows, columns), evenly spread."""
    height, width = table.shape
    if tokens == 0:
        return table.new_empty(0)
    rows = min(max(round(math.sqrt(tokens * height / width)), math.ceil(tokens / width), 1), height, tokens)
    ends = torch.arange(rows + 1) * tokens // rows
    chosen = [
        table[row, _spread(int(end - start), width)]
        for row, start, end in zip(_spread(rows, height), ends[:-1], ends[1:])
    ]
    return torch.cat(chosen)


def _spread(picks: int, length: int) -> torch.Tensor:
    """Centres of `picks` equal pieces of `length` places."""
    return (2 * torch.arange(picks) + 1) * length // (2 * picks)


def random(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
) -> torch.Tensor:
    """Keeps tokens of one image at random, all with the same chance.

    Args:
        features: (T, D), what the language model receives for the image; only T is used.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention: not needed.
        layout: where the newlines are; without one there are none.
        generator: the source of randomness, required unless all tokens stay.
        newline: "row", "keep", "drop" (see `with_newlines`) or "compete" (newlines are tokens like any other).

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: no generator, or a budget, layout or newline that does not fit.
    """
    layout = layout_for(features, layout)
    check_newline(newline, compete=True)
    budget = count(budget, len(features))
    if budget == len(features):
        return torch.arange(len(features), device=features.device)
    if generator is None:
        raise StudioError("Random pruning needs a generator: give generator=torch.Generator().manual_seed(0).")
    content = torch.arange(len(features)) if newline == "compete" else layout.content
    order = content[torch.randperm(len(content), generator=generator, device=generator.device).cpu()]
    if newline == "compete":
        return order[:budget].sort().values.to(features.device)
    return with_newlines(lambda picks: order[:picks], budget, layout, newline).to(features.device)
