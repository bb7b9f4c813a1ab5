"""Which newline embeddings of an image stay, so that newlines and content together are exactly the budget."""

from collections.abc import Callable

import torch

from studio.checks import check_choice
from studio.errors import StudioError
from studio.pruning.budget import count
from studio.pruning.layout import Layout, layout_for

NEWLINES = ("row", "keep", "drop", "compete")


def check_newline(newline: str, *, compete: bool) -> None:
    """Check how newlines are treated.

    Raises:
        StudioError: an unknown name, or "compete" with a method that has no score for newlines.
    """
    check_choice("newline", newline, NEWLINES)
    if newline == "compete" and not compete:
        raise StudioError("This method has no score for newlines: choose row, keep or drop instead of compete.")


def with_newlines(pick: Callable[[int], torch.Tensor], budget: int, layout: Layout, newline: str) -> torch.Tensor:
    """Picks content tokens and adds newlines.

    Args:
        pick: for a number of content tokens, their places in the packed sequence; asked for at most `budget`.
        budget: content and newlines together, at least 1 and less than all.
        layout: of the packed sequence.
        newline: "row" keeps the newline of every row that keeps a content token; "keep" keeps all; "drop" none.

    Returns:
        (budget,) places, sorted. "drop" gives fewer when there is less content than `budget`, and so does "row" in an
        image so narrow that rows hold nothing but a newline; "row" gives one fewer, or leaves out one newline, where
        a budget of a few tokens has no room for both.

    Raises:
        StudioError: "keep" leaves no room for content.
    """
    contents = len(layout.content)
    if newline == "drop" or not len(layout.newlines):
        return pick(min(budget, contents)).sort().values
    if newline == "keep":
        if budget <= len(layout.newlines):
            raise StudioError(
                f"{budget} tokens are no room for {len(layout.newlines)} newlines and content: keep more, or use 'row'."
            )
        return torch.cat((pick(budget - len(layout.newlines)), layout.newlines)).sort().values
    return _with_rows(pick, budget, layout)


def in_order(
    features: torch.Tensor,
    budget: int | float,
    layout: Layout | None,
    newline: str,
    order: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    compete: bool = False,
) -> torch.Tensor:
    """The first picks of a greedy order of the content tokens, with newlines, exactly `budget`.

    Args:
        features, budget, layout, newline: as of a pruning method; "compete" makes newlines content.
        order: of places of content tokens, on the device of the features, and a number: which of them to pick, in
            order; the first picks must not depend on the number.
        compete: whether newlines may be content.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: a budget, layout or newline that does not fit.
    """
    check_newline(newline, compete=compete)
    layout = layout_for(features, layout)
    budget, device = count(budget, len(features)), features.device
    if budget == len(features):
        return torch.arange(len(features), device=device)
    if newline == "compete" or not len(layout.newlines):
        return order(torch.arange(len(features), device=device), budget).sort().values
    content = layout.content
    chosen = content[order(content.to(device), min(budget, len(content))).cpu()]
    return with_newlines(lambda picks: chosen[:picks], budget, layout, newline).to(device)


def _rows(chosen: torch.Tensor, layout: Layout) -> torch.Tensor:
    rows = layout.newline_of[chosen].unique()
    return rows[rows >= 0]


def _with_rows(pick, budget: int, layout: Layout) -> torch.Tensor:
    most = min(budget, len(layout.content))
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        chosen = pick(middle)
        low, high = (middle, high) if middle + len(_rows(chosen, layout)) <= budget else (low, middle - 1)
    chosen = pick(low)
    rows = _rows(chosen, layout)
    missing = budget - len(chosen) - len(rows)
    if missing < 0:
        return chosen.sort().values
    if missing:
        taken, ends = torch.zeros(len(layout), dtype=torch.bool), layout.newline_of
        taken[chosen] = True
        preferred = torch.cat((pick(most), layout.content))
        free = ~taken[preferred] & ((ends[preferred] < 0) | torch.isin(ends[preferred], rows))
        places = dict.fromkeys(preferred[free].tolist())
        chosen = torch.cat((chosen, torch.tensor([*places][:missing], dtype=torch.long)))
    return torch.cat((chosen, rows)).sort().values
