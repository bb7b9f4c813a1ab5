"""Drawing all levels of all cells in a chosen number of calls, however deep the codes are (ResGen, arXiv:2412.10208).

Every call predicts for each cell the sum of its hidden code vectors; a draw of that sum is quantised from the first
hidden level on; the most confident slots stay, the shallowest levels of a cell first, and the rest is forgotten. After
call t of T, ceil(gamma(t / T) L D) slots are hidden.

Published: this loop, top-p on the mixture, a temperature on confidence, guidance. Ours, because nothing more is known:
confidence is the log-likelihood of the quantised sum under the mixture, for a whole cell or as each level's gain, plus
Gumbel noise that fades linearly; guidance (arXiv:2207.12598) extrapolates what the head gives, logits and scores, with
a scale that rises linearly from 1; `scatter` multiplies the spread around a mean.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from studio.decoding.autoregressive import guided_logits
from studio.decoding.residual_masks import SCHEDULES, hidden_slots, reveal, shown
from studio.decoding.sampling import exponential_noise, filter_logits, is_finite_number, sample_rows
from studio.errors import StudioError

CONFIDENCES = ("cell", "level")


@dataclass(frozen=True)
class ResidualUnmasking:
    """Settings of ResGen's loop.

    Args:
        steps: calls of the network.
        top_p: keep the likeliest components (or codes) that together hold this probability, in (0, 1].
        scatter: multiplies the standard deviation around a mean; 0 takes the mean itself.
        confidence: "cell" (one number for all levels of a cell) or "level" (what each level adds).
        confidence_temperature: of the noise on confidence at the start; 0: none.
        schedule: how the number of hidden slots falls, see `hidden_slots`.

    Errors: `StudioError` for a value outside these ranges.
    """

    steps: int = 16
    top_p: float = 1.0
    scatter: float = 1.0
    confidence: str = "cell"
    confidence_temperature: float = 1.0
    schedule: str = "cosine"

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise StudioError(f"steps must be a whole number of at least 1, not {self.steps!r}.")
        if not is_finite_number(self.top_p) or not 0 < self.top_p <= 1:
            raise StudioError(f"top_p must be above 0 and at most 1, not {self.top_p!r}.")
        for name in ("scatter", "confidence_temperature"):
            value = getattr(self, name)
            if not is_finite_number(value) or value < 0:
                raise StudioError(f"{name} must be a finite number of at least 0, not {value!r}.")
        for name, allowed in (("confidence", CONFIDENCES), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in allowed:
                raise StudioError(f"{name} is one of {', '.join(allowed)}, not {value!r}.")


@torch.no_grad()
def residual_unmasking(
    model: torch.nn.Module,
    quantizer: torch.nn.Module,
    condition: dict,
    *,
    generators: list[torch.Generator],
    guidance_scale: float = 1.0,
    settings: ResidualUnmasking | None = None,
    on_step: Callable[[int, torch.Tensor], bool | None] | None = None,
) -> torch.Tensor:
    """Draws B pictures: codes (B, L, D), int64; -1 where a slot is hidden still, because the loop was stopped.

    Args:
        model: a `ResGen` in evaluation mode.
        quantizer: the `ResidualQuantizer` of its tokenizer.
        condition: `{"class_labels": (B,)}` or `{"captions": (B, T, C), "caption_mask": (B, T)}`.
        generators: one per picture.
        guidance_scale: at the last call; 1 leaves out the null rows.
        on_step: called as (number of the call from 0, codes); True stops the loop.
    """
    settings = settings or ResidualUnmasking()
    propose = _PROPOSALS[model.config.prediction]
    batch, depth, positions = len(generators), quantizer.depth, model.config.num_positions
    device = next(iter(condition.values())).device
    codes = torch.full((batch, positions, depth), -1, device=device)
    hidden = torch.full((batch, positions), depth, device=device)
    for step in range(settings.steps):
        visible = quantizer.lookup(codes).sum(dim=-2)
        said = _predict(model, visible, hidden, condition, _scale_at(step, settings.steps, guidance_scale))
        proposed, confidence = propose(model.head, said, quantizer, hidden, settings, generators)
        fading = settings.confidence_temperature * (1 - (step + 1) / settings.steps)
        if fading:
            gumbel = -exponential_noise(batch, positions * depth, generators, device).log()
            confidence = confidence + fading * gumbel.view_as(confidence)
        left = hidden_slots((step + 1) / settings.steps, positions * depth, settings.schedule)
        hidden = reveal(hidden, confidence, left)
        codes = torch.where(shown(hidden, depth), torch.where(codes < 0, proposed, codes), -1)
        if on_step is not None and on_step(step, codes):
            break
    return codes


def _scale_at(step, steps, scale):
    return scale if steps == 1 or scale == 1 else 1 + (scale - 1) * step / (steps - 1)


def _predict(model, visible, hidden, condition, scale):
    """What the head gives for each cell, guided."""
    if scale == 1:
        return model(visible, hidden, **condition)
    twice = {name: torch.cat((value, value)) for name, value in condition.items() if value is not None}
    drop = torch.arange(2 * len(visible), device=visible.device) >= len(visible)
    said = model(torch.cat((visible, visible)), torch.cat((hidden, hidden)), **twice, drop=drop)
    return type(said)(*(guided_logits(part, scale) for part in said))


def propose_from_mixture(head, said, quantizer, hidden, settings, generators):
    """Codes (B, L, D) of hidden levels, from a draw of their sum, -1 at visible ones; confidence (B, L, D)."""
    batch, positions, components = said.logits.shape
    weights = filter_logits(said.logits.flatten(0, 1), top_p=settings.top_p).softmax(dim=-1)
    race = exponential_noise(batch, positions * components, generators, weights.device).view_as(weights)
    means = head.mean(said, sample_rows(weights, noise=race).view(batch, positions))
    sums = means + settings.scatter * head.sigma * _normal_noise(means, generators)
    depth = quantizer.depth
    codes = quantizer.encode(sums, first=depth - hidden)
    partial = quantizer.lookup(codes).cumsum(dim=-2)
    if settings.confidence == "cell":
        return codes, head.log_likelihood(said, partial[..., -1, :])[..., None].expand_as(codes)
    points = (torch.zeros_like(sums), *partial.unbind(-2))
    return codes, torch.stack([head.log_likelihood(said, point) for point in points], dim=-1).diff(dim=-1)


def propose_from_levels(head, said, quantizer, hidden, settings, generators):
    """The ablation's codes (B, L, D), each level drawn on its own, -1 at visible ones; confidence (B, L, D)."""
    shape, depth = said.logits.shape[:3], quantizer.depth
    laws = filter_logits(said.logits.flatten(0, 2), top_p=settings.top_p).softmax(dim=-1)
    race = exponential_noise(shape[0], laws.numel() // shape[0], generators, laws.device).view_as(laws)
    drawn = sample_rows(laws, noise=race).view(shape)
    confidence = said.logits.log_softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
    return torch.where(shown(hidden, depth), -1, drawn), confidence


_PROPOSALS = {"mixture": propose_from_mixture, "levels": propose_from_levels}


def _normal_noise(like, generators):
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device).to(like.device) for g in generators]
    return torch.stack(rows)
