"""Settings that every way to draw residual codes with ResGen (arXiv:2412.10208) has."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from studio.decoding.masked_steps import is_count
from studio.decoding.residual_laws import ResidualLaw
from studio.decoding.residual_masks import SCHEDULES, hidden_after_calls
from studio.decoding.sampling import is_finite_number
from studio.errors import StudioError


@dataclass(frozen=True, kw_only=True)
class ResidualSteps(ABC):
    """Settings of a loop.

    Args:
        steps: calls of the network, 1 to the number of codes of a picture; None leaves it to whoever draws.
        schedule: how the number of hidden slots falls, see `hidden_slots`.
        scatter: multiplies the standard deviation around a mean, as the temperature does; 0 takes the mean itself.

    Errors: `StudioError` for a value outside these ranges.
    """

    steps: int | None = None
    schedule: str = "cosine"
    scatter: float = 1.0

    DEFAULT_STEPS: ClassVar[int] = 16
    """What takes the place of None."""

    def __post_init__(self):
        if self.steps is not None and not is_count(self.steps):
            raise StudioError(f"steps must be a whole number of at least 1, not {self.steps!r}.")
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_not_negative("scatter", self.scatter)

    def filled(self, steps: int = DEFAULT_STEPS) -> Self:
        """These settings with so many steps where there is None."""
        return self if self.steps is not None else replace(self, steps=steps)

    def plan(self, slots: int) -> list[int]:
        """How many of the slots of a picture are hidden after each call, for settings that are filled.

        Errors: `StudioError` for more steps than slots.
        """
        return hidden_after_calls(self.steps, slots, self.schedule)

    @abstractmethod
    def preference(
        self, law: ResidualLaw, codes: torch.Tensor, fading: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Which slots are shown first: numbers (B, L, D), those of the first ones greatest.

        Args:
            law: that the codes were drawn from.
            codes: (B, L, D), -1 in slots shown before.
            fading: falls from 1 to 0 over the calls.
            generators: one per picture.
        """


def check_one_of(name: str, value, allowed) -> None:
    """Raises a `StudioError` for a value that is none of those allowed."""
    if value not in allowed:
        raise StudioError(f"{name} is one of {', '.join(allowed)}, not {value!r}.")


def check_not_negative(name: str, value) -> None:
    """Raises a `StudioError` for what is no finite number of at least 0."""
    if not is_finite_number(value) or value < 0:
        raise StudioError(f"{name} must be a finite number of at least 0, not {value!r}.")
