"""TokenBridge's decoding: in a random order, a few more cells at each step, each cell dimension by dimension.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.3 and the
authors' sampler. Guidance (arXiv:2207.12598) extrapolates the states of the transformer, not logits, so the
head runs once.

Deviations from the authors' code: each image has its own generator; the head keeps a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from studio.decoding.autoregressive import condition_rows, guided_logits
from studio.decoding.mar import MaskedSteps, Step
from studio.decoding.masked_runs import MaskedRun, MaskedSampler
from studio.decoding.sampling import KnownTokens, OnStep, Sampled, Sampling, exponential_noise, sample_rows
from studio.models.masked_autoencoder import Masked
from studio.models.token_bridge import TokenBridge


@dataclass(frozen=True, kw_only=True)
class DimensionWise(MaskedSteps):
    """Settings of the loop: those of `MaskedSteps`."""


@dataclass
class DimensionWiseOutput(Sampled):
    """As of `Sampled`, but `tokens` are (B, L, D), -1 in cells not yet sampled, and `seconds` holds "transformer" and
    "head".
    """


@torch.no_grad()
def dimension_wise(
    model: TokenBridge,
    level_values: torch.Tensor,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    settings: DimensionWise | None = None,
    on_step: OnStep | None = None,
    order: torch.Tensor | None = None,
    known: KnownTokens | None = None,
) -> DimensionWiseOutput:
    """Samples all tokens of B images, in the tokenizer's order of dimensions.

    Args:
        model: a `TokenBridge` in evaluation mode.
        level_values: what levels stand for (V,), of its tokenizer.
        condition: `{"class_labels": (B,)}` or `{"captions": (B, T, C), "caption_mask": (B, T)}`.
        generators: one per image; an image does not depend on the others.
        sampling: of every dimension.
        guidance_scale: at its greatest; 1 is no guidance.
        on_step: called as (number of the step, tokens (B, L, D) which may be written to); True stops the loop.
        order: of the cells (B, L) in place of the generators'; cells at its end are sampled first.
        known: tokens (B, L, D) of cells that are not sampled; the others are, given these.

    Raises:
        StudioError: for more steps than cells.
    """
    settings, sampler = (settings or DimensionWise()).filled(), DimensionWiseSampler(model, level_values)
    run = sampler.start(
        condition,
        generators=generators,
        sampling=sampling or Sampling(),
        guidance_scale=guidance_scale,
        settings=settings,
        order=order,
        known=known,
    )
    sampler.finish(run, on_step)
    return DimensionWiseOutput(run.tokens, run.number, sampler.rows, sampler.seconds)


@dataclass(eq=False, kw_only=True)
class DimensionWiseRun(MaskedRun):
    """As of `MaskedRun`.

    Attributes:
        order: of cells (B, L).
        buffer: of the transformer.
        generators: one per image.
        sampling: of every dimension.
    """

    settings: DimensionWise
    plan: list[Step]
    order: torch.Tensor
    buffer: torch.Tensor
    generators: list[torch.Generator]
    sampling: Sampling

    @property
    def final(self) -> int:
        """As of `MaskedRun`."""
        return self.order.shape[1] - (self.plan[self.number - 1].first if self.number else self.plan[0].last)

    @property
    def total(self) -> int:
        """As of `MaskedRun`: D of each cell."""
        return len(self.tokens) * self.final * self.tokens.shape[2]


class Cells(NamedTuple):
    """Cells of B images, k of each, that are sampled alike.

    Args:
        states: outputs of the transformer for them (B, k, C).
        sampling: of every dimension.
        generators: one per image.
    """

    states: torch.Tensor
    sampling: Sampling
    generators: list[torch.Generator]


class DimensionWiseSampler(MaskedSampler[DimensionWiseRun]):
    """A `TokenBridge` at work; `level_values` as of `dimension_wise`. Runs share the calls of the head, too."""

    def __init__(self, model: TokenBridge, level_values: torch.Tensor) -> None:
        super().__init__()
        self.model, self.level_values = model, level_values

    @torch.no_grad()
    def start(
        self,
        condition: dict,
        *,
        generators: list[torch.Generator],
        sampling: Sampling,
        guidance_scale: float,
        settings: DimensionWise,
        order: torch.Tensor | None = None,
        known: KnownTokens | None = None,
    ) -> DimensionWiseRun:
        """As of `MaskedSampler`; `order` and `known` as of `dimension_wise`."""
        model = self.model
        plan = settings.plan(model.num_tokens, None if known is None else known.unknown)
        buffer, _ = condition_rows(model, condition, guided=guidance_scale != 1)
        order = _random_order(generators, model.num_tokens, model.device) if order is None else order
        tokens = torch.full((*order.shape, len(model.order)), -1, device=model.device)
        if known is not None:
            order, tokens = known.known_last(order), known.write(tokens)
        return DimensionWiseRun(
            tokens=tokens,
            guidance_scale=guidance_scale,
            settings=settings,
            plan=plan,
            order=order,
            buffer=buffer,
            generators=generators,
            sampling=sampling,
        )

    def predict(self, runs: Sequence[DimensionWiseRun]) -> list[torch.Tensor]:
        """Guided states (B, k, C) of the cells that each run samples next."""
        parts = []
        for run in runs:
            step, values = run.plan[run.number], self.level_values.to(run.buffer.dtype)[run.tokens]
            parts.append(Masked(values, run.order[:, step.last :], run.order[:, step.first : step.last], run.buffer))
        self.rows += sum(len(run.buffer) for run in runs)
        return [
            states[0]
            if len(states) == 1
            else guided_logits(states.flatten(0, 1), run.settings.scale_at(run.plan[run.number], run.guidance_scale))
            for run, states in zip(runs, self.model.conditions_together(parts))
        ]

    def sample(self, runs: Sequence[DimensionWiseRun], predicted: list[torch.Tensor]) -> None:
        """As of `MaskedSampler`."""
        parts = [Cells(states, run.sampling, run.generators) for run, states in zip(runs, predicted)]
        for run, cells in zip(runs, sample_cells(self.model, parts)):
            step = run.plan[run.number]
            images = torch.arange(len(cells), device=cells.device)[:, None]
            in_place = torch.empty_like(cells).index_copy_(2, self.model.order, cells)
            run.tokens[images, run.order[:, step.first : step.last]] = in_place


def sample_cells(model: TokenBridge, parts: Sequence[Cells]) -> list[torch.Tensor]:
    """Tokens (B, k, D) of each part, in the order of sampling."""
    head, counts = model.head, [part.states.shape[0] * part.states.shape[1] for part in parts]
    condition = head.condition_proj(torch.cat([part.states.flatten(0, 1) for part in parts]))
    cache, first_step = head.new_cache(len(condition)), model.config.sampling_first_input_adds_step_embedding
    level: torch.Tensor | None = None
    levels: list[torch.Tensor] = []
    for _ in range(head.dimensions):
        logits = head.next_logits(condition, level, cache, first_step)
        level = torch.cat([_levels(part, found) for part, found in zip(parts, logits.split(counts))])
        levels.append(level)
    cells = torch.stack(levels, dim=-1).split(counts)
    return [found.unflatten(0, part.states.shape[:2]) for part, found in zip(parts, cells)]


def _levels(part: Cells, logits: torch.Tensor) -> torch.Tensor:
    """Levels (n,) of the next dimension of all cells of a part, from logits (n, V)."""
    if part.sampling.greedy:
        return logits.argmax(dim=-1)
    count = part.states.shape[1] * logits.shape[1]
    race = exponential_noise(len(part.states), count, part.generators, logits.device)
    return sample_rows(part.sampling.probabilities(logits), noise=race.view_as(logits))


def _random_order(generators, cells, device):
    rows = [torch.randperm(cells, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(rows).to(device)
