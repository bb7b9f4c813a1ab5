"""Grids of an image's tokens: accepted drafts and tokens that the model sampled itself, or the code of each token."""

import math
from collections.abc import Sequence
from html import escape

from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.render.token_planes import TokenPlane

_MOST_SQUARES = 1024  # of all planes shown, except the first
_MOST_NUMBERED = 8  # columns of a plane whose numbers are legible


def token_grid(trace: DraftTrace, title: str) -> str:
    """Render the drafts of one image as a grid with a legend.

    Args:
        trace: the accepted and rejected drafts.
        title: for screen readers.

    Returns:
        HTML with an SVG.
    """
    side = math.ceil(math.sqrt(trace.total))
    sampled = frozenset(range(trace.sampled)) if trace.positions is None else trace.positions
    own = sorted(sampled - trace.accepted)
    rejected = sum(trace.rejected.values())
    squares = "".join(
        f'<path class="{name}" d="{"".join(_square(position, side) for position in positions)}"/>'
        for name, positions in (
            ("open", [position for position in range(trace.total) if position not in sampled]),
            ("own", own),
            ("accepted", sorted(trace.accepted)),
        )
    )
    dots = "".join(_dot(position, side, count) for position, count in sorted(trace.rejected.items()))
    numbers = {"accepted": (len(trace.accepted), "accepted drafts"), "own": (len(own), "sampled by the model")}
    numbers["rejected"] = (rejected, "rejected drafts")
    spoken = f"{title}: " + ", ".join(f"{count} {what}" for count, what in numbers.values())
    legend = "".join(
        f'<li class="{name}"><i></i><b>{count}</b> {escape(what)}</li>' for name, (count, what) in numbers.items()
    )
    return (
        f'<figure class="studio-tokens"><svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(spoken)}">'
        f"{squares}{dots}</svg><figcaption><ul>{legend}</ul></figcaption></figure>"
    )


def code_grids(planes: Sequence[TokenPlane]) -> str:
    """Render the planes of an image's tokens, as many as fit on a page; each square has its code.

    Args:
        planes: at least one.

    Returns:
        HTML with an SVG for each plane.
    """
    shown = planes[: max(1, _MOST_SQUARES // len(planes[0].names))]
    left = len(planes) - len(shown)
    more = f"<p>and {left} more</p>" if left else ""
    return f'<div class="studio-codes">{"".join(map(_code_grid, shown))}{more}</div>'


def _code_grid(plane: TokenPlane) -> str:
    rows = math.ceil(len(plane.names) / plane.columns)
    used = sum(plane.kept)
    spoken = f"{plane.title}: {used} of {len(plane.names)} used"
    squares = "".join(_code(plane, position) for position in range(len(plane.names)))
    return (
        f"<figure><figcaption>{escape(plane.title)} <span>{used} of {len(plane.names)}</span></figcaption>"
        f'<svg viewBox="0 0 {plane.columns} {rows}" role="img" aria-label="{escape(spoken)}">{squares}</svg></figure>'
    )


def _code(plane: TokenPlane, position: int) -> str:
    row, column = divmod(position, plane.columns)
    name = escape(plane.names[position])
    number = f'<text x="{column + 0.5:g}" y="{row + 0.5:g}">{name}</text>' if plane.columns <= _MOST_NUMBERED else ""
    return (
        f'<g class="{"kept" if plane.kept[position] else "dropped"}">'
        f'<path fill="{plane.colours[position]}" d="{_square(position, plane.columns)}"/>'
        f"{number}<title>{name}</title></g>"
    )


def _square(position: int, side: int) -> str:
    row, column = divmod(position, side)
    return f"M{column + 0.06:g} {row + 0.06:g}h.88v.88h-.88z"


def _dot(position: int, side: int, count: int) -> str:
    """Larger where more drafts were rejected."""
    row, column = divmod(position, side)
    radius = min(0.12 + 0.05 * count, 0.36)
    return f'<circle class="rejected" cx="{column + 0.5:g}" cy="{row + 0.5:g}" r="{radius:.2f}"/>'
