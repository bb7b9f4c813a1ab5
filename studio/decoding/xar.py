"""xAR's decoding: cell after cell, each a flow from noise that attends to the finished cells.

"Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv:2502.20388), section 3, and the
authors' sampler: the stochastic differential equation of the flow at times from 1 to .04, and one step without noise to
0. Earlier cells are clean; their keys and values are computed once. Guidance (arXiv:2207.12598) of cell n of N has the
scale 1 + (s - 1) n / (N - 1), so the first cell is unguided.

Deviation from the authors' code: each image has its own generator.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from studio.checks import check_integer, set_fields
from studio.decoding.autoregressive import check_schedule, condition_rows, guided_logits, scheduled_scale
from studio.decoding.sampling import Fillable, OnStep, Sampled
from studio.models.xar import XAR

LAST_TIME = 0.04
"""The time from which the last step goes to 0."""


@dataclass(frozen=True, kw_only=True)
class XARDecoding(Fillable):
    """Settings of the loop.

    Args:
        steps: of the flow of a cell, each one call of the transformer; None leaves it to whoever samples.
        guidance_schedule: "linear" lets guidance grow over the cells, "constant" does not; None leaves it to whoever
            samples.

    Raises:
        StudioError: for a value outside these.
    """

    steps: int | None = None
    guidance_schedule: str | None = None

    DEFAULTS: ClassVar[dict[str, Any]] = {"steps": 20, "guidance_schedule": "linear"}

    def __post_init__(self) -> None:
        if self.steps is not None:
            set_fields(self, steps=check_integer("steps", self.steps, 1))
        check_schedule(self.guidance_schedule)

    def times(self) -> list[float]:
        """The times of the flow, steps + 1 of them, from 1 to 0, for settings that are filled."""
        if self.steps == 1:
            return [1.0, 0.0]
        return [*torch.linspace(1, LAST_TIME, self.steps, dtype=torch.float64).tolist(), 0.0]

    def scale_at(self, cell: int, cells: int, guidance_scale: float) -> float:
        """The guidance of a cell."""
        share = cell / (cells - 1) if cells > 1 else 1.0
        return scheduled_scale(self.guidance_schedule, guidance_scale, share)


def flow_to_data(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    times: list[float],
    noise: Callable[[int], torch.Tensor],
    temperature: float = 1.0,
) -> torch.Tensor:
    """The state at the last time.

    Args:
        velocity: called as (state, time); the mean of noise minus data, given the state.
        x: the state at the first time.
        times: falling.
        noise: called with the number of a step; standard Gaussian numbers like x. The last step has none.
        temperature: factor on the noise.
    """
    for step, (now, following) in enumerate(zip(times, times[1:])):
        change = following - now
        mean = x + change * ((2 - now) * velocity(x, now) + x)
        is_last = step == len(times) - 2
        x = mean if is_last else mean + temperature * (2 * now * -change) ** 0.5 * noise(step)
    return x


@torch.no_grad()
def xar_decoding(
    model: XAR,
    condition: dict,
    *,
    generators: list[torch.Generator],
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    settings: XARDecoding | None = None,
    on_step: OnStep | None = None,
) -> Sampled:
    """Samples the tokens (B, L, D), float32, of B images, cell by cell.

    Args:
        model: an `XAR` in evaluation mode.
        condition: `{"class_labels": (B,)}` or `{"captions": (B, T, C), "caption_mask": (B, T)}`.
        generators: one per image; an image does not depend on the others.
        guidance_scale: at its greatest; 1 is no guidance.
        temperature: factor on the noise of every step but the first state's.
        on_step: called as (cell, tokens (B, L, D), which may be written to); True stops the loop.
    """
    settings, began = (settings or XARDecoding()).filled(), time.perf_counter()
    times, inside = settings.times(), model.cell_tokens
    rows = condition_rows(model, condition, guided=guidance_scale != 1)
    streams = len(rows.vector) // len(generators)
    cache = model.prefill(rows)
    shape = (inside, model.config.token_dim)
    tokens = torch.zeros(len(generators), model.num_tokens, shape[1], device=model.device)
    sampled = Sampled(tokens, seconds={"prefill": time.perf_counter() - began})

    def noise(_: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(model.device)

    for cell in range(model.num_cells):
        scale = settings.scale_at(cell, model.num_cells, guidance_scale)

        def velocity(x: torch.Tensor, now: float, cell: int = cell, scale: float = scale) -> torch.Tensor:
            found = model.cell_velocity(x.repeat(streams, 1, 1).to(model.dtype), now, cell, rows, cache).float()
            sampled.target_calls += 1
            sampled.row_calls += len(found)
            return found if streams == 1 else guided_logits(found, scale)

        finished = flow_to_data(velocity, noise(-1), times, noise, temperature)
        tokens[:, cell * inside : (cell + 1) * inside] = finished
        if on_step is not None and on_step(cell, tokens):
            break
        if cell + 1 < model.num_cells:
            kept = tokens[:, cell * inside : (cell + 1) * inside].repeat(streams, 1, 1).to(model.dtype)
            model.keep_cell(kept, cell, rows, cache)
    sampled.seconds["decode"] = time.perf_counter() - began - sampled.seconds["prefill"]
    return sampled
