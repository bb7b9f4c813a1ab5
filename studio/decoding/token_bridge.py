"""TokenBridge's decoding: in a random order, a few more cells at each step, each cell dimension by dimension.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.3 and the
authors' sampler. Guidance (arXiv:2207.12598) extrapolates the states of the transformer, not logits, so the
head runs once.

Deviations from the authors' code: each image has its own generator; the head keeps a cache.
"""

import time
from dataclasses import dataclass

import torch

from studio.decoding.autoregressive import condition_rows, guided_logits
from studio.decoding.mar import MaskedSteps
from studio.decoding.sampling import KnownTokens, OnStep, Sampled, Sampling, exponential_noise, sample_rows
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
    settings, sampling = (settings or DimensionWise()).filled(), sampling or Sampling()
    plan = settings.plan(model.num_tokens, None if known is None else known.unknown)
    began = time.perf_counter()
    buffer, _ = condition_rows(model, condition, guided=guidance_scale != 1)
    order = _random_order(generators, model.num_tokens, model.device) if order is None else order
    images, dimensions = torch.arange(len(order), device=model.device)[:, None], model.order
    tokens = torch.full((*order.shape, len(dimensions)), -1, device=model.device)
    if known is not None:
        order, tokens = known.known_last(order), known.write(tokens)
    sampled = DimensionWiseOutput(tokens, seconds={"transformer": 0.0, "head": 0.0})
    for number, step in enumerate(plan):
        wanted = order[:, step.first : step.last]
        values = level_values.to(buffer.dtype)[tokens]
        states = model.conditions(values, order[:, step.last :], wanted, buffer).flatten(0, 1)
        if guidance_scale != 1:
            states = guided_logits(states, settings.scale_at(step, guidance_scale))
        sampled.target_calls += 1
        sampled.row_calls += len(buffer)
        predicted = time.perf_counter()
        cells = sample_cells(model, states, sampling, generators)
        tokens[images, wanted] = torch.empty_like(cells).index_copy_(2, dimensions, cells)
        ended = time.perf_counter()
        sampled.seconds["head"] += ended - predicted
        sampled.seconds["transformer"] += predicted - began
        began = ended
        if on_step is not None and on_step(number, tokens):
            break
    return sampled


def sample_cells(
    model: TokenBridge, states: torch.Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> torch.Tensor:
    """Tokens (B, k, D), in the order of sampling, of cells about which the transformer says states (B, k, C)."""
    head, (batch, count) = model.head, states.shape[:2]
    condition = head.condition_proj(states.flatten(0, 1))
    cache, first_step = head.new_cache(len(condition)), model.config.sampling_first_input_adds_step_embedding
    level: torch.Tensor | None = None
    levels: list[torch.Tensor] = []
    for _ in range(head.dimensions):
        logits = head.next_logits(condition, level, cache, first_step)
        if sampling.greedy:
            level = logits.argmax(dim=-1)
        else:
            race = exponential_noise(batch, count * logits.shape[1], generators, logits.device)
            level = sample_rows(sampling.probabilities(logits), noise=race.view_as(logits))
        levels.append(level)
    return torch.stack(levels, dim=-1).unflatten(0, (batch, count))


def _random_order(generators, cells, device):
    rows = [torch.randperm(cells, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(rows).to(device)
