"""Which newline embeddings stay, so that newlines and content together are exactly the budget."""

from collections.abc import Callable

import torch

from studio.checks import check_choice
from studio.errors import StudioError
from studio.pruning.layout import Layout

NEWLINES = ("row", "keep", "drop", "compete")


def check_newline(newline: str, *, compete: bool) -> None:
    """Errors: `StudioError` for an unknown name, and for "compete" with a method that has no score for newlines."""
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
        (budget,) places, sorted. "drop" gives fewer when there is less content than `budget`, and so does "row" in a
        picture so narrow that rows hold nothing but a newline; "row" gives one fewer, or leaves out one newline, where
        a budget of a few tokens has no room for both.

    Errors: `StudioError` when "keep" leaves no room for content.
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
