"""How many tokens are kept, and how a number is divided among parts without losing any."""

import math
from numbers import Integral, Real

from studio.checks import shown
from studio.errors import StudioError


def is_fraction(budget: object) -> bool:
    """Whether a budget is a share of the tokens, not a number of them."""
    return isinstance(budget, Real) and not isinstance(budget, Integral)


def count(budget: int | float, total: int) -> int:
    """The number of tokens a budget stands for.

    Args:
        budget: a whole number of tokens, from 1 up (more than `total` means all), or a fraction in (0, 1].
        total: how many tokens there are.

    Returns:
        A number from 1 to `total`; a fraction is rounded as Python's `round` does.

    Raises:
        StudioError: any other budget.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise StudioError(f"A budget is a number of tokens or a fraction above 0 and at most 1, not {shown(budget)}.")
    if is_fraction(budget):
        if not 0 < budget <= 1:
            raise StudioError(f"Keep a fraction of the tokens above 0 and at most 1, not {shown(budget)}.")
        return min(max(1, round(float(budget) * total)), total)
    if budget < 1:
        raise StudioError(f"Keep at least 1 token, not {shown(budget)}.")
    return min(int(budget), total)


def fraction(budget: int | float) -> float:
    """The budget as the ratio the authors' code takes.

    Raises:
        StudioError: anything but a fraction in (0, 1].
    """
    if not is_fraction(budget) or not 0 < budget <= 1:
        raise StudioError(f"The authors' numbers need a fraction above 0 and at most 1 as budget, not {shown(budget)}.")
    return float(budget)


def apportion(total: int, weights: list[float], caps: list[int]) -> list[int]:
    """Divides `total` in proportion to `weights`, no part above its cap, by largest remainder.

    What a cap cuts off goes to the other parts in proportion to their weights; parts without weight get something only
    when the others are full, in proportion to the room they have.

    Args:
        total: at least 0; more than all caps together means all of them.
        weights: one number of at least 0 for each part.
        caps: the most each part can take.

    Returns:
        Whole numbers that add up to `min(total, sum(caps))`.
    """
    left = float(min(total, sum(caps)))
    shares = [0.0] * len(caps)
    free = [part for part, cap in enumerate(caps) if cap > 0]
    while free and left > 1e-9:
        heavy = [part for part in free if weights[part] > 0]
        weight = {part: weights[part] for part in heavy} or {part: float(caps[part] - shares[part]) for part in free}
        scale = left / sum(weight.values())
        full = [part for part, w in weight.items() if w * scale >= caps[part] - shares[part]]
        for part in full or weight:
            given = caps[part] - shares[part] if full else weight[part] * scale
            shares[part] += given
            left -= given
        free = [part for part in free if part not in full] if full else []
    return _whole(shares, caps, min(total, sum(caps)))


def _whole(shares: list[float], caps: list[int], total: int) -> list[int]:
    parts = [min(math.floor(share + 1e-9), cap) for share, cap in zip(shares, caps)]
    by_remainder = sorted(range(len(parts)), key=lambda part: (parts[part] - shares[part], part))
    for part in by_remainder:
        if sum(parts) < total and parts[part] < caps[part]:
            parts[part] += 1
    return parts
