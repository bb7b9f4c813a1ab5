"""Settings that every way to draw residual codes with ResGen (arXiv:2412.10208) has."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from studio.checks import check_choice, check_integer, check_number, set_fields
from studio.decoding.residual_laws import ResidualLaw
from studio.decoding.residual_masks import SCHEDULES, hidden_after_calls


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
        if self.steps is not None:
            set_fields(self, steps=check_integer("steps", self.steps, 1))
        check_choice("schedule", self.schedule, SCHEDULES)
        set_fields(self, scatter=check_number("scatter", self.scatter))

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
