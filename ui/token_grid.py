"""The grid of a picture's tokens: which were drafts, which the model drew itself, where drafts were rejected."""

import math
from html import escape


def token_grid(fates, title):
    """Draw the grid with its legend.

    Args:
        fates: `TokenFates`.
        title: what the grid shows; read aloud together with the numbers.
    """
    side = math.isqrt(fates.total)
    there = frozenset(range(fates.drawn)) if fates.places is None else fates.places
    own = sorted(there - fates.accepted)
    rejected = sum(fates.rejected.values())
    squares = "".join(
        f'<path class="{name}" d="{"".join(_square(place, side) for place in places)}"/>'
        for name, places in (
            ("open", [place for place in range(fates.total) if place not in there]),
            ("own", own),
            ("accepted", sorted(fates.accepted)),
        )
    )
    dots = "".join(_dot(place, side, count) for place, count in sorted(fates.rejected.items()))
    numbers = {"accepted": (len(fates.accepted), "accepted drafts"), "own": (len(own), "drawn by the model")}
    numbers["rejected"] = (rejected, "rejected drafts")
    spoken = f"{title}: " + ", ".join(f"{count} {what}" for count, what in numbers.values())
    legend = "".join(
        f'<li class="{name}"><i></i><b>{count}</b> {escape(what)}</li>' for name, (count, what) in numbers.items()
    )
    return (
        f'<figure class="studio-tokens"><svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(spoken)}">'
        f"{squares}{dots}</svg><figcaption><ul>{legend}</ul></figcaption></figure>"
    )


def _square(place, side):
    row, column = divmod(place, side)
    return f"M{column + 0.06:g} {row + 0.06:g}h.88v.88h-.88z"


def _dot(place, side, count):
    """Larger where more drafts were rejected."""
    row, column = divmod(place, side)
    radius = min(0.12 + 0.05 * count, 0.36)
    return f'<circle class="rejected" cx="{column + 0.5:g}" cy="{row + 0.5:g}" r="{radius:.2f}"/>'
