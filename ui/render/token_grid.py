"""Grids of an image's tokens: which were drafts and which the model drew itself, or what code each of them is."""

import math
from html import escape

_MOST_SQUARES = 1024  # of all planes that are sampled, but for the first
_MOST_NUMBERED = 8  # columns of a plane whose numbers are legible


def token_grid(trace, title):
    """Sample the grid with its legend.

    Args:
        trace: `DraftTrace`.
        title: what the grid shows; read aloud together with the numbers.
    """
    side = math.ceil(math.sqrt(trace.total))
    there = frozenset(range(trace.sampled)) if trace.places is None else trace.places
    own = sorted(there - trace.accepted)
    rejected = sum(trace.rejected.values())
    squares = "".join(
        f'<path class="{name}" d="{"".join(_square(place, side) for place in places)}"/>'
        for name, places in (
            ("open", [place for place in range(trace.total) if place not in there]),
            ("own", own),
            ("accepted", sorted(trace.accepted)),
        )
    )
    dots = "".join(_dot(place, side, count) for place, count in sorted(trace.rejected.items()))
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


def code_grids(planes):
    """Sample the planes of an image's tokens, as many as a page takes; each square says its code.

    Args:
        planes: a list of `TokenPlane`.
    """
    shown = planes[: max(1, _MOST_SQUARES // len(planes[0].names))]
    left = len(planes) - len(shown)
    more = f"<p>and {left} more</p>" if left else ""
    return f'<div class="studio-codes">{"".join(map(_code_grid, shown))}{more}</div>'


def _code_grid(plane):
    rows = math.ceil(len(plane.names) / plane.columns)
    used = sum(plane.kept)
    spoken = f"{plane.title}: {used} of {len(plane.names)} used"
    squares = "".join(_code(plane, place) for place in range(len(plane.names)))
    return (
        f"<figure><figcaption>{escape(plane.title)} <span>{used} of {len(plane.names)}</span></figcaption>"
        f'<svg viewBox="0 0 {plane.columns} {rows}" role="img" aria-label="{escape(spoken)}">{squares}</svg></figure>'
    )


def _code(plane, place):
    row, column = divmod(place, plane.columns)
    name = escape(plane.names[place])
    number = f'<text x="{column + 0.5:g}" y="{row + 0.5:g}">{name}</text>' if plane.columns <= _MOST_NUMBERED else ""
    return (
        f'<g class="{"kept" if plane.kept[place] else "dropped"}">'
        f'<path fill="{plane.colours[place]}" d="{_square(place, plane.columns)}"/>{number}<title>{name}</title></g>'
    )


def _square(place, side):
    row, column = divmod(place, side)
    return f"M{column + 0.06:g} {row + 0.06:g}h.88v.88h-.88z"


def _dot(place, side, count):
    """Larger where more drafts were rejected."""
    row, column = divmod(place, side)
    radius = min(0.12 + 0.05 * count, 0.36)
    return f'<circle class="rejected" cx="{column + 0.5:g}" cy="{row + 0.5:g}" r="{radius:.2f}"/>'
