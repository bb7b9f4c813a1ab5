"""Which of the L D slots of an image of residual codes are hidden: how many, after which call, and in which cells.

ResGen (arXiv:2412.10208) hides the deepest levels of a cell first. In training, hidden slots are chosen without
replacement, so the numbers per cell follow the multivariate hypergeometric distribution and never exceed D (those of
the paper's multinomial distribution may). Which schedule the paper uses is not known, so three are here.
"""

import math

import torch

from studio.checks import check_choice
from studio.errors import StudioError

SCHEDULES = ("cosine", "circle", "arccos")
_ROUNDING = 1e-9


def hidden_slots(progress: torch.Tensor | float, slots: int, schedule: str = "cosine") -> torch.Tensor:
    """ceil(gamma(r) slots), int64, for progress r in [0, 1]: all slots at 0, none at 1.

    gamma is cos(pi r / 2), sqrt(1 - r^2) or 2 arccos(r) / pi.

    Raises:
        StudioError: for another schedule.
    """
    check_choice("schedule", schedule, SCHEDULES)
    r = torch.as_tensor(progress, dtype=torch.float64)
    if schedule == "cosine":
        gamma = (r * math.pi / 2).cos()
    elif schedule == "circle":
        gamma = (1 - r.square()).sqrt()
    else:
        gamma = r.arccos() * 2 / math.pi
    return (gamma * slots - _ROUNDING).ceil().long().clamp(0, slots)


def hidden_after_calls(calls: int, slots: int, schedule: str = "cosine") -> list[int]:
    """How many slots are hidden after each call: as scheduled, but every call shows at least one, and the last all.

    Raises:
        StudioError: for more calls than slots.
    """
    if calls > slots:
        raise StudioError(f"An image has {slots} codes: sample them in at most as many steps, not {calls}.")
    numbers, before = [], slots
    for call in range(1, calls + 1):
        scheduled = int(hidden_slots(call / calls, slots, schedule))
        before = max(calls - call, min(before - 1, scheduled))
        numbers.append(before)
    return numbers


def hide(noise: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """How many levels are hidden in each cell (B, L), when `count` (B,) slots of each image are.

    `noise` (B, L, D), independent and of one distribution, orders the slots: the smallest are hidden. The same noise
    with a larger count hides more everywhere.
    """
    return _is_among_smallest(noise, count).sum(dim=-1)


def reveal(hidden: torch.Tensor, preference: torch.Tensor, left: torch.Tensor | int) -> torch.Tensor:
    """How many levels (B, L) stay hidden, `left` (B,) or one number in all, of those that were.

    The hidden slots preferred most decide how many levels each cell shows; those are its shallowest ones.

    Args:
        hidden: levels (B, L) hidden before.
        preference: (B, L, D) for every slot, such as a confidence; those of visible slots do not matter.
        left: at most as many as were hidden.
    """
    was_hidden = ~shown(hidden, preference.shape[-1])
    order = preference.masked_fill(~was_hidden, float("inf"))
    left = torch.as_tensor(left, device=hidden.device).expand(len(hidden))
    return (_is_among_smallest(order, left) & was_hidden).sum(dim=-1)


def shown(hidden: torch.Tensor, depth: int) -> torch.Tensor:
    """Which slots (B, L, D) are visible when so many levels (B, L) of each cell are hidden."""
    return torch.arange(depth, device=hidden.device) < depth - hidden[..., None]


def _is_among_smallest(values, count):
    ranks = values.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks < count[:, None]).view(values.shape)
