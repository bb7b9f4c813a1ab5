"""ResGen's decoding: all levels of all residual codes in a chosen number of calls, however deep the codes are.

ResGen (arXiv:2412.10208): of the L D slots of an image, ceil(gamma(r) L D) are hidden, from the deepest level of a cell
up, and decoding lowers that number call by call. Every call predicts for each cell the distribution of the sum of its
hidden code vectors (a mixture or, in the ablation, a softmax for each level); a sample of that sum is quantised from
the first hidden level on. Which slots then stay, the shallowest levels of a cell first, is a matter of the settings:

- `ResGenDecoding`: the most confident ones, as in the paper. Ours, because nothing more is known: confidence is the
  log-likelihood of the quantised sum under the mixture, for a whole cell or as each level's gain, plus Gumbel noise
  that fades linearly.
- `FirstHitting`: those that a random order gives. The network is given which slots are hidden and not the time, so
  between two moments at which a slot is hit its prediction does not change: "Masked Diffusion Models are Secretly
  Time-Agnostic Masked Models" (arXiv:2409.02908) therefore samples from one hit to the next. Here the order of the hits
  is sampled, and they are cut into as many groups as there may be calls, of the sizes that the schedule gives (ours:
  not of random sizes, so that the number of calls is exact and the same for all images). With one call for each code no
  two codes of an image are sampled at once and nothing is approximate but the network; with fewer calls those of a
  group that lie in different cells (in the ablation: all of them) are sampled independently, which is all that is lost.

Published: this loop, top-p on the mixture, a temperature on confidence, guidance. Ours: guidance (arXiv:2207.12598)
extrapolates what the head predicts, logits and scores, with a scale that rises linearly from 1; the sampling
temperature divides the mixture's logits and multiplies the spread around a mean; every call shows at least one slot, so
none is wasted where the schedule moves slowly. `studio.decoding.residual_masks` has the schedules.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from studio.checks import check_choice, check_integer, check_number, set_fields
from studio.decoding.autoregressive import check_schedule, guided_logits, scheduled_scale
from studio.decoding.masked_runs import MaskedRun, MaskedSampler
from studio.decoding.residual_masks import SCHEDULES, hidden_after_calls, reveal, shown
from studio.decoding.sampling import Fillable, KnownTokens, OnStep, Sampled, Sampling, exponential_noise, sample_rows
from studio.errors import StudioError
from studio.models.resgen import ResGen


class ResidualDistribution(ABC):
    """The distribution of one call.

    Args:
        head: that of the network.
        predicted: what the head gave for every cell.
        quantizer: the tokenizer's.

    Attributes:
        has_spread: whether there is one that `scatter` multiplies.
    """

    has_spread: bool

    def __init__(self, head: Any, predicted: Any, quantizer: Any) -> None:
        self.head, self.predicted, self.quantizer = head, predicted, quantizer

    @classmethod
    def check(cls, scatter: float) -> None:
        """Raises a `StudioError` for a `scatter` that would change nothing."""
        if scatter != 1 and not cls.has_spread:
            raise StudioError("This model has a softmax for every level and no spread: leave out scatter.")

    @abstractmethod
    def sample(
        self, hidden: torch.Tensor, sampling: Sampling, scatter: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Codes (B, L, D) of all hidden levels, of which each cell has `hidden` (B, L); -1 in the others."""

    @abstractmethod
    def level_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        """What each code (B, L, D) adds to the log-likelihood of its cell (B, L, D), in order; -1 adds nothing."""

    @abstractmethod
    def cell_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        """The log-likelihood of the codes (B, L, D) of a cell together, the same (B, L, D) for each of them."""


class MixtureDistribution(ResidualDistribution):
    """A component is sampled and a vector around its mean, which is quantised from the first hidden level on."""

    has_spread = True

    def sample(
        self, hidden: torch.Tensor, sampling: Sampling, scatter: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        sums = self.head.mean(self.predicted, _sample(self.predicted.logits, sampling, generators))
        if spread := scatter * sampling.temperature:
            sums = sums + spread * self.head.sigma * _normal_noise(sums, generators)
        return self.quantizer.encode(sums, first=self.quantizer.depth - hidden)

    def level_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        partial = self.quantizer.lookup(codes).cumsum(dim=-2)
        points = (torch.zeros_like(partial[..., 0, :]), *partial.unbind(-2))
        return torch.stack([self.head.log_likelihood(self.predicted, point) for point in points], dim=-1).diff(dim=-1)

    def cell_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        total = self.quantizer.lookup(codes).sum(dim=-2)
        return self.head.log_likelihood(self.predicted, total)[..., None].expand(codes.shape)


class LevelDistribution(ResidualDistribution):
    """Every level is sampled on its own."""

    has_spread = False

    def sample(
        self, hidden: torch.Tensor, sampling: Sampling, scatter: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        sampled = _sample(self.predicted.logits, sampling, generators)
        return torch.where(shown(hidden, self.quantizer.depth), -1, sampled)

    def level_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        chosen = self.predicted.logits.log_softmax(dim=-1).gather(-1, codes.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(codes < 0, 0)

    def cell_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        return self.level_confidence(codes).sum(dim=-1, keepdim=True).expand(codes.shape)


DISTRIBUTIONS = {"mixture": MixtureDistribution, "levels": LevelDistribution}
"""By what the network predicts."""


def gumbel_noise(like: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard Gumbel noise in the shape of a tensor (B, ...), float32; that of row i by generators[i] alone."""
    noise = exponential_noise(len(like), like[0].numel(), generators, like.device)
    return -noise.log().view(like.shape)


def _sample(logits, sampling, generators):
    """Numbers (B, ...) out of logits (B, ..., V)."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    distributions = sampling.probabilities(logits.flatten(0, -2))
    race = exponential_noise(len(logits), distributions.numel() // len(logits), generators, distributions.device)
    return sample_rows(distributions, noise=race.view_as(distributions)).view(logits.shape[:-1])


def _normal_noise(like, generators):
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device).to(like.device) for g in generators]
    return torch.stack(rows)


@dataclass(frozen=True, kw_only=True)
class ResidualSteps(Fillable, ABC):
    """Settings of a loop.

    Args:
        steps: calls of the network, 1 to the number of codes of an image; None leaves it to whoever samples.
        schedule: how the number of hidden slots falls, see `hidden_slots`.
        scatter: multiplies the standard deviation around a mean, as the temperature does; 0 takes the mean itself.
        guidance_schedule: "linear" lets guidance grow from 1 at the first call, "constant" does not; None leaves it to
            whoever samples.

    Raises:
        StudioError: for a value outside these ranges.
    """

    steps: int | None = None
    schedule: str = "cosine"
    scatter: float = 1.0
    guidance_schedule: str | None = None

    DEFAULTS: ClassVar[dict[str, Any]] = {"steps": 16, "guidance_schedule": "linear"}
    joins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps is not None:
            set_fields(self, steps=check_integer("steps", self.steps, 1))
        check_choice("schedule", self.schedule, SCHEDULES)
        set_fields(self, scatter=check_number("scatter", self.scatter))
        check_schedule(self.guidance_schedule)

    def plan(self, slots: int) -> list[int]:
        """How many of the slots of an image are hidden after each call, for settings that are filled.

        Raises:
            StudioError: for more steps than slots.
        """
        assert self.steps is not None
        return hidden_after_calls(self.steps, slots, self.schedule)

    @abstractmethod
    def preference(
        self, distribution: ResidualDistribution, codes: torch.Tensor, fading: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Which slots are shown first: numbers (B, L, D), those of the first ones greatest.

        Args:
            distribution: that the codes were sampled from.
            codes: (B, L, D), -1 in slots shown before.
            fading: falls from 1 to 0 over the calls.
            generators: one per image.
        """


@dataclass(frozen=True, kw_only=True)
class FirstHitting(ResidualSteps):
    """Settings for `resgen_decoding`, which then shows slots in a random order: those of `ResidualSteps`."""

    def preference(
        self, distribution: ResidualDistribution, codes: torch.Tensor, fading: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Noise (B, L, D): any hidden slot is as likely as any other."""
        return gumbel_noise(codes, generators)


CONFIDENCES = ("cell", "level")


@dataclass(frozen=True, kw_only=True)
class ResGenDecoding(ResidualSteps):
    """Settings of ResGen's loop: those of `ResidualSteps`, and what makes a slot stay.

    Args:
        confidence: "cell" (one number for all levels of a cell) or "level" (what each level adds).
        confidence_temperature: of the noise on confidence at the start; 0: none.

    Raises:
        StudioError: for a value outside these ranges.
    """

    confidence: str = "cell"
    confidence_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("confidence", self.confidence, CONFIDENCES)
        set_fields(self, confidence_temperature=check_number("confidence_temperature", self.confidence_temperature))

    def preference(
        self, distribution: ResidualDistribution, codes: torch.Tensor, fading: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The confidence (B, L, D), give or take noise that fades."""
        confidence = (
            distribution.cell_confidence(codes) if self.confidence == "cell" else distribution.level_confidence(codes)
        )
        noise = self.confidence_temperature * fading
        return confidence + noise * gumbel_noise(confidence, generators) if noise else confidence


@dataclass
class ResGenOutput(Sampled):
    """As of `Sampled`, but `tokens` are codes (B, L, D), -1 where a slot is hidden still because the loop was stopped,
    and `seconds` holds "transformer" and "head".
    """


@torch.no_grad()
def resgen_decoding(
    model: ResGen,
    quantizer: Any,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    settings: ResidualSteps | None = None,
    on_step: OnStep | None = None,
    known: KnownTokens | None = None,
) -> ResGenOutput:
    """Samples B images.

    Args:
        model: a `ResGen` in evaluation mode.
        quantizer: the `ResidualQuantizer` of its tokenizer.
        condition: `{"class_labels": (B,)}` or `{"captions": (B, T, C), "caption_mask": (B, T)}`.
        generators: one per image; an image does not depend on the others.
        sampling: of components (of the ablation: of codes); its temperature also multiplies the spread around a mean.
        guidance_scale: at its greatest; 1 leaves out the unconditional rows.
        settings: which slots are shown when: `ResGenDecoding()` when None.
        on_step: called as (number of the call from 0, codes (B, L, D), whose shown ones may be changed); True stops.
        known: codes (B, L, D) of cells that are not sampled; the others are, given these.

    Raises:
        StudioError: for more steps than an image has codes, and for settings that would change nothing.
    """
    sampler = ResGenSampler(model, quantizer)
    run = sampler.start(
        condition,
        generators=generators,
        sampling=sampling or Sampling(),
        guidance_scale=guidance_scale,
        settings=(settings or ResGenDecoding()).filled(),
        known=known,
    )
    sampler.finish(run, on_step)
    return ResGenOutput(run.tokens, run.number, sampler.rows, sampler.seconds)


class ResGenStep(NamedTuple):
    """A call: its number among those of a whole image, and how many slots of an image are hidden after it."""

    number: int
    left: int


@dataclass(eq=False, kw_only=True)
class ResGenRun(MaskedRun):
    """As of `MaskedRun`.

    Attributes:
        condition, generators, sampling: as of `resgen_decoding`.
        hidden: slots of an image that are hidden at the start.
    """

    settings: ResidualSteps
    plan: list[ResGenStep]
    condition: dict[str, torch.Tensor]
    generators: list[torch.Generator]
    sampling: Sampling
    hidden: int

    @property
    def final(self) -> int:
        """As of `MaskedRun`."""
        left = self.plan[self.number - 1].left if self.number else self.hidden
        return self.tokens[0].numel() - left

    @property
    def sampled(self) -> int:
        """As of `MaskedRun`."""
        return -(-self.final // self.tokens.shape[2])

    @property
    def scale(self) -> float:
        """Guidance of the next call."""
        steps = self.settings.steps
        assert steps is not None
        share = self.plan[self.number].number / (steps - 1) if steps > 1 else 1.0
        return scheduled_scale(self.settings.guidance_schedule, self.guidance_scale, share)

    @property
    def fading(self) -> float:
        """As of `ResidualSteps.preference`, in the next call."""
        assert self.settings.steps is not None
        return 1 - (self.plan[self.number].number + 1) / self.settings.steps


class ResGenSampler(MaskedSampler[ResGenRun]):
    """A `ResGen` at work, with the `ResidualQuantizer` of its tokenizer."""

    def __init__(self, model: ResGen, quantizer: Any) -> None:
        super().__init__()
        self.model, self.quantizer, self.kind = model, quantizer, DISTRIBUTIONS[model.config.prediction]

    @torch.no_grad()
    def start(
        self,
        condition: dict,
        *,
        generators: list[torch.Generator],
        sampling: Sampling,
        guidance_scale: float,
        settings: ResidualSteps,
        known: KnownTokens | None = None,
    ) -> ResGenRun:
        """As of `MaskedSampler`; `known` as of `resgen_decoding`."""
        self.kind.check(settings.scatter)
        condition = {name: value for name, value in condition.items() if value is not None}
        depth, unknown = self.quantizer.depth, self.model.config.num_positions
        device = next(iter(condition.values())).device
        codes = torch.full((len(generators), unknown, depth), -1, device=device)
        plan = [ResGenStep(number, left) for number, left in enumerate(settings.plan(unknown * depth))]
        if known is not None:
            codes, unknown = known.write(codes), known.unknown
        return ResGenRun(
            tokens=codes,
            guidance_scale=guidance_scale,
            settings=settings,
            plan=[step for step in plan if step.left < unknown * depth],
            condition=condition,
            generators=generators,
            sampling=sampling,
            hidden=unknown * depth,
        )

    def predict(self, runs: Sequence[ResGenRun]) -> list[Any]:
        """What the head gives for each cell of each run, guided."""
        guided = [run.scale != 1 for run in runs]
        sizes = [len(run.tokens) * (1 + each) for run, each in zip(runs, guided)]

        def rows(of_images: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([part for each, twice in zip(of_images, guided) for part in [each] * (1 + twice)])

        codes = [run.tokens for run in runs]
        visible = rows([self.quantizer.lookup(each).sum(dim=-2) for each in codes])
        hidden = rows([(each < 0).sum(dim=-1) for each in codes])
        condition = {name: rows([run.condition[name] for run in runs]) for name in runs[0].condition}
        if any(guided):
            dropped = [torch.arange(size, device=hidden.device) >= len(each) for each, size in zip(codes, sizes)]
            condition["drop"] = torch.cat(dropped)
        predicted = self.model(visible, hidden, **condition)
        self.rows += len(visible)
        split = zip(*(part.split(sizes) for part in predicted))
        return [
            type(predicted)(*(guided_logits(part, run.scale) if twice else part for part in parts))
            for run, twice, parts in zip(runs, guided, split)
        ]

    def sample(self, runs: Sequence[ResGenRun], predicted: list[Any]) -> None:
        """As of `MaskedSampler`."""
        for run, found in zip(runs, predicted):
            codes, settings = run.tokens, run.settings
            hidden = (codes < 0).sum(dim=-1)
            distribution = self.kind(self.model.head, found, self.quantizer)
            proposed = distribution.sample(hidden, run.sampling, settings.scatter, run.generators)
            preference = settings.preference(distribution, proposed, run.fading, run.generators)
            remains = shown(reveal(hidden, preference, run.plan[run.number].left), self.quantizer.depth)
            run.tokens = torch.where(remains, torch.where(codes < 0, proposed, codes), -1)
