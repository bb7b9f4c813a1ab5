"""What the loops of masked models share: images that are not equally far share calls of the transformer.

Scheduling by iteration as in Orca (Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative
Models", OSDI 2022), for masked models. The images of one request make a `MaskedRun`: they have the same steps and
settings, so they are always equally far. A `MaskedSampler` does the next step of several runs at once, whatever their
conditions, guidance, temperatures and numbers of steps, and however far each is. A call of a pipeline is a run that is
alone. Random numbers are those of each image's generator, so a run in company differs from one that is alone by the
rounding of sums only.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from studio.decoding.sampling import OnStep


@dataclass(eq=False, kw_only=True)
class MaskedRun(ABC):
    """The images of one request.

    Attributes:
        tokens: (B, L, D) so far.
        guidance_scale: at its greatest.
        settings: filled.
        plan: its steps.
        number: steps that are done.
    """

    tokens: torch.Tensor
    guidance_scale: float
    settings: Any
    plan: list[Any]
    number: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all steps are done."""
        return self.number == len(self.plan)

    @property
    def reported(self) -> tuple[torch.Tensor, ...]:
        """What is reported of a step after its number."""
        return (self.tokens,)

    @property
    def known(self) -> torch.Tensor:
        """Which positions (B, L) are sampled, at least in part."""
        return (self.tokens >= 0).any(dim=2)

    @property
    @abstractmethod
    def final(self) -> int:
        """What steps have sampled of each image: positions, or codes where a step samples single codes."""

    @property
    def sampled(self) -> int:
        """Positions that these would fill."""
        return self.final

    @property
    def total(self) -> int:
        """Tokens that are sampled, over all images."""
        return len(self.tokens) * self.final


Run = TypeVar("Run", bound=MaskedRun)


class MaskedSampler(ABC, Generic[Run]):
    """A model at work.

    Attributes:
        rows: sequences over all calls of the transformer.
        seconds: in the "transformer" and in the "head".
    """

    def __init__(self) -> None:
        self.rows = 0
        self.seconds = {"transformer": 0.0, "head": 0.0}

    @abstractmethod
    def start(
        self,
        condition: dict,
        *,
        generators: list[torch.Generator],
        sampling: Any,
        guidance_scale: float,
        settings: Any,
    ) -> Run:
        """The images of a request, before their first step; settings are filled."""

    @abstractmethod
    def predict(self, runs: Sequence[Run]) -> list[Any]:
        """Outputs of the transformer for the next step of each run, in one call."""

    @abstractmethod
    def sample(self, runs: Sequence[Run], predicted: list[Any]) -> None:
        """Writes the tokens of the next step of each run."""

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> None:
        """Does the next step of each run, none of which is whole."""
        began = time.perf_counter()
        predicted = self.predict(runs)
        answered = time.perf_counter()
        self.sample(runs, predicted)
        for run in runs:
            run.number += 1
        self.seconds["transformer"] += answered - began
        self.seconds["head"] += time.perf_counter() - answered

    def finish(self, run: Run, on_step: OnStep | None) -> None:
        """Does all steps of a run that is alone; `on_step` hears of each and may stop it."""
        while not run.is_whole:
            self.step([run])
            if on_step is not None and on_step(run.number - 1, *run.reported):
                break
