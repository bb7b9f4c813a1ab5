"""Masked autoregressive decoding: in a random order, a few more tokens at each step, each drawn by a diffusion head.

"Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838), section 4 and the authors' sampler.
How many tokens a step draws: see `masked_steps`.

The result is that of the authors' sampler on the same random numbers, up to rounding (`textbook_masked` has it written
plainly), with less work: see `denoising`; and the last decoder block answers only for the tokens that are drawn.
Deviations: each picture has its own generator; more steps than tokens are refused, as some would draw nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from studio.checks import check_integer, check_number, set_fields
from studio.decoding.autoregressive import Drawn, condition_rows
from studio.decoding.denoising import Kernels, TimedHead, descend
from studio.decoding.masked_steps import MaskedSteps, Step
from studio.decoding.position_noise import Places, PositionNoise


@dataclass(frozen=True, kw_only=True)
class MaskedAutoregressive(MaskedSteps):
    """Settings of the loop: those of `MaskedSteps`, and

    Args:
        diffusion_steps: denoising steps of a token, 1 to 1000; None leaves it to whoever draws.

    Errors: `StudioError` for a value outside these.
    """

    diffusion_steps: int | None = None

    DEFAULTS: ClassVar[dict[str, int]] = {"steps": 64, "diffusion_steps": 100}

    def __post_init__(self):
        super().__post_init__()
        if self.diffusion_steps is not None:
            set_fields(self, diffusion_steps=check_integer("diffusion_steps", self.diffusion_steps, 1, 1000))


@dataclass
class MaskedDrawn(Drawn):
    """As of `Drawn`, but `tokens` (B, L, D) are float32, and `seconds` holds "transformer" and "head"."""


class Painter:
    """A `MAR` at work on B pictures of one call: its conditions, its head, and the seconds of each."""

    def __init__(self, model: torch.nn.Module, condition: dict, guided: bool, diffusion_steps: int):
        began = time.perf_counter()
        self.model = model
        self.buffer, _ = condition_rows(model, condition, guided=guided)
        self.head = TimedHead(model.diffloss, diffusion_steps)
        self.calls = self.rows = 0
        self.seconds, self.lost = 0.0, time.perf_counter() - began

    def kernels(self, tokens: torch.Tensor, order: torch.Tensor, step: Step, scale: float) -> Kernels:
        """What the model makes of the known tokens: the kernels of the entries that the step draws, in their order."""
        began = time.perf_counter()
        visible, wanted = order[:, step.last :], order[:, step.first : step.last]
        conditions = self.model.conditions(tokens.to(self.buffer.dtype), visible, wanted, self.buffer)
        self.calls += 1
        self.rows += len(self.buffer)
        self.seconds += time.perf_counter() - began
        return Kernels(self.head, conditions.flatten(1, 2), scale)


def put(tokens: torch.Tensor, places: Places, values: torch.Tensor) -> None:
    """Writes values (n, D) into tokens (B, L, D)."""
    tokens[places.pictures, places.positions] = values


@torch.no_grad()
def masked_autoregressive(
    model: torch.nn.Module,
    condition: dict,
    *,
    generators: list[torch.Generator] | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    settings: MaskedAutoregressive | None = None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], bool | None] | None = None,
    noise: PositionNoise | None = None,
) -> MaskedDrawn:
    """Draws all tokens of B pictures.

    Args:
        model: a `MAR` in evaluation mode.
        condition: `{"class_labels": (B,)}`.
        generators: one per picture; a picture does not depend on the others.
        guidance_scale: at its greatest; 1 is no guidance.
        temperature: multiplies the standard deviation of every denoising step, at least 0.
        on_step: called as (number of the step, positions (B, k) that it drew, tokens (B, L, D) which may be written
            to); True stops the loop. Tokens not yet drawn are 0.
        noise: random numbers in place of the generators'.

    Errors: `StudioError` for more steps than tokens and for a temperature that is none.
    """
    settings = (settings or MaskedAutoregressive()).filled()
    check_number("temperature", temperature)
    plan = settings.plan(model.num_tokens)
    began = time.perf_counter()
    painter = Painter(model, condition, guidance_scale != 1, settings.diffusion_steps)
    noise = noise or PositionNoise.of(generators, model.config.token_dim, model.device)
    order = noise.order(model.num_tokens)
    tokens = torch.zeros(*order.shape, model.config.token_dim, device=model.device)
    for number, step in enumerate(plan):
        kernels = painter.kernels(tokens, order, step, settings.scale_at(step, guidance_scale))
        drawn = order[:, step.first : step.last]
        places = Places.of(drawn)
        for _, _, mean, _ in descend(
            kernels, noise.start(places), noise.steps(places, settings.diffusion_steps), temperature
        ):
            token = mean
        put(tokens, places, token)
        if on_step is not None and on_step(number, drawn, tokens):
            break
    head = time.perf_counter() - began - painter.seconds
    return MaskedDrawn(tokens, painter.calls, painter.rows, {"transformer": painter.seconds, "head": head})
