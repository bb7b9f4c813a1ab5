"""How many tokens each step of masked decoding draws: the cosine of MaskGIT (arXiv:2202.04200, section 3.3), and how
guidance grows meanwhile, as MAR (arXiv:2406.11838) and TokenBridge (arXiv:2503.16430) have it.

Deviation from their authors' code: more steps than tokens are refused, as some would draw nothing.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

from studio.checks import check_choice, check_integer, set_fields
from studio.errors import StudioError

GUIDANCE_SCHEDULES = ("linear", "constant")


class Step(NamedTuple):
    """Draws the entries `first` to `last` - 1 of each order; those from `last` on are known.

    `progress` is the share of tokens that the schedule counts as known, which guidance grows with.
    """

    first: int
    last: int
    progress: float


@dataclass(frozen=True, kw_only=True)
class MaskedSteps:
    """Settings of a masked loop.

    Args:
        steps: calls of the transformer, 1 to the number of tokens; None leaves it to whoever draws.
        guidance_schedule: "linear" lets guidance grow with the share of known tokens, "constant" does not.

    Errors: `StudioError` for a value outside these.
    """

    steps: int | None = None
    guidance_schedule: str = "linear"

    DEFAULTS: ClassVar[dict[str, int]] = {"steps": 64}
    """What takes the place of None."""

    def __post_init__(self):
        if self.steps is not None:
            set_fields(self, steps=check_integer("steps", self.steps, 1))
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)

    def filled(self, **defaults: int) -> Self:
        """These settings with a number for every None: one of `defaults`, such as a pipeline's, else of `DEFAULTS`."""
        missing = [name for name in self.DEFAULTS if getattr(self, name) is None]
        return replace(self, **{name: defaults.get(name, self.DEFAULTS[name]) for name in missing})

    def plan(self, total: int) -> list[Step]:
        """The steps that draw `total` tokens, for settings that are filled."""
        if self.steps > total:
            raise StudioError(f"A picture has {total} tokens: draw them in at most as many steps, not {self.steps}.")
        plan, last = [], total
        for number in range(1, self.steps + 1):
            left = max(1, min(last - 1, math.floor(total * math.cos(math.pi / 2 * number / self.steps))))
            plan.append(Step(0 if number == self.steps else left, last, (total - left) / total))
            last = left
        return plan

    def scale_at(self, step: Step, guidance_scale: float) -> float:
        """The guidance of a step."""
        return 1 + (guidance_scale - 1) * step.progress if self.guidance_schedule == "linear" else guidance_scale
