"""Drawing all levels of all cells in a chosen number of calls, however deep the codes are (ResGen, arXiv:2412.10208).

Every call predicts for each cell the sum of its hidden code vectors; a draw of that sum is quantised from the first
hidden level on; the most confident slots stay, the shallowest levels of a cell first, and the rest is forgotten. After
call t of T, ceil(gamma(t / T) L D) slots are hidden.

Published: this loop, top-p on the mixture, a temperature on confidence, guidance. Ours, because nothing more is known:
confidence is the log-likelihood of the quantised sum under the mixture, for a whole cell or as each level's gain, plus
Gumbel noise that fades linearly; guidance (arXiv:2207.12598) extrapolates what the head gives, logits and scores, with
a scale that rises linearly from 1; the sampling temperature divides the mixture's logits and multiplies the spread
around a mean; every call shows at least one slot, so none is wasted where the schedule moves slowly.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from studio.checks import check_choice, check_number, set_fields
from studio.decoding.autoregressive import Drawn, guided_logits
from studio.decoding.residual_laws import LAWS, gumbel_noise
from studio.decoding.residual_masks import reveal, shown
from studio.decoding.residual_steps import ResidualSteps
from studio.decoding.sampling import Sampling

CONFIDENCES = ("cell", "level")


@dataclass(frozen=True, kw_only=True)
class ResidualUnmasking(ResidualSteps):
    """Settings of ResGen's loop: those of `ResidualSteps`, and what makes a slot stay.

    Args:
        confidence: "cell" (one number for all levels of a cell) or "level" (what each level adds).
        confidence_temperature: of the noise on confidence at the start; 0: none.

    Errors: `StudioError` for a value outside these ranges.
    """

    confidence: str = "cell"
    confidence_temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("confidence", self.confidence, CONFIDENCES)
        set_fields(self, confidence_temperature=check_number("confidence_temperature", self.confidence_temperature))

    def preference(self, law, codes, fading, generators):
        """The confidence (B, L, D), give or take noise that fades."""
        confidence = law.cell_confidence(codes) if self.confidence == "cell" else law.level_confidence(codes)
        noise = self.confidence_temperature * fading
        return confidence + noise * gumbel_noise(confidence, generators) if noise else confidence


@dataclass
class ResidualDrawn(Drawn):
    """As of `Drawn`, but `tokens` are codes (B, L, D), -1 where a slot is hidden still because the loop was stopped,
    and `seconds` holds "transformer" and "head".
    """


@torch.no_grad()
def residual_unmasking(
    model: torch.nn.Module,
    quantizer: torch.nn.Module,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    settings: ResidualSteps | None = None,
    on_step: Callable[[int, torch.Tensor], bool | None] | None = None,
) -> ResidualDrawn:
    """Draws B pictures.

    Args:
        model: a `ResGen` in evaluation mode.
        quantizer: the `ResidualQuantizer` of its tokenizer.
        condition: `{"class_labels": (B,)}` or `{"captions": (B, T, C), "caption_mask": (B, T)}`.
        generators: one per picture; a picture does not depend on the others.
        sampling: of components (of the ablation: of codes); its temperature also multiplies the spread around a mean.
        guidance_scale: at the last call; 1 leaves out the null rows.
        settings: which slots are shown when: `ResidualUnmasking()` when None.
        on_step: called as (number of the call from 0, codes (B, L, D), whose shown ones may be changed); True stops.

    Errors: `StudioError` for more steps than a picture has codes, and for settings that would change nothing.
    """
    settings, sampling = (settings or ResidualUnmasking()).filled(), sampling or Sampling()
    kind = LAWS[model.config.prediction]
    kind.check(settings.scatter)
    depth, positions = quantizer.depth, model.config.num_positions
    codes = torch.full((len(generators), positions, depth), -1, device=next(iter(condition.values())).device)
    drawn = ResidualDrawn(codes, seconds={"transformer": 0.0, "head": 0.0})
    for step, left in enumerate(settings.plan(positions * depth)):
        began = time.perf_counter()
        scale = _scale_at(step, settings.steps, guidance_scale)
        visible, hidden = quantizer.lookup(codes).sum(dim=-2), (codes < 0).sum(dim=-1)
        said = _predict(model, visible, hidden, condition, scale)
        drawn.target_calls += 1
        drawn.row_calls += len(codes) * (1 if scale == 1 else 2)
        answered = time.perf_counter()
        law = kind(model.head, said, quantizer)
        proposed = law.draw(hidden, sampling, settings.scatter, generators)
        preference = settings.preference(law, proposed, 1 - (step + 1) / settings.steps, generators)
        remains = shown(reveal(hidden, preference, left), depth)
        drawn.tokens = codes = torch.where(remains, torch.where(codes < 0, proposed, codes), -1)
        drawn.seconds["transformer"] += answered - began
        drawn.seconds["head"] += time.perf_counter() - answered
        if on_step is not None and on_step(step, codes):
            break
    return drawn


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
