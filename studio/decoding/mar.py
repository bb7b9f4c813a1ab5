"""Masked autoregressive decoding: in a random order, a few more tokens at each step, each sampled by a diffusion head.

"Autoregressive Image Generation without Vector Quantization" (MAR, arXiv:2406.11838), section 4 and the authors'
sampler. How many tokens a step samples follows the cosine of MaskGIT (arXiv:2202.04200, section 3.3), and guidance
grows meanwhile, as in MAR and TokenBridge (arXiv:2503.16430); see `MaskedSteps`. How the head makes a token of a
condition stands in `denoising`.

The result is that of the authors' sampler on the same random numbers, up to rounding (`textbook_masked` has it written
plainly), with less work: times are embedded once for all calls, conditions once for all steps, and the shifts, scales
and gates of many steps are one product; the last decoder block runs on the tokens that are sampled only; on a CPU a
step is one call of C where that works. Deviations: each image has its own generator; more steps than tokens are
refused, as some would sample nothing.

Options that are papers of their own stand in files of their own: `disa` (fewer denoising steps for later tokens),
`lazy_mar` (most calls of the transformer recompute a part) and `gtr` (an order that lets later calls sample more).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from studio.checks import check_choice, check_integer, check_number, set_fields
from studio.decoding.autoregressive import check_schedule, condition_rows, scheduled_scale
from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.denoising import ReverseTransitions, TimedHead, TimedHeads, denoise
from studio.decoding.disa import ANNEALINGS, LATEST_TIME, annealed_steps
from studio.decoding.gtr import gtr_counts, gtr_order, gtr_sets
from studio.decoding.lazy_mar import REFRESH_EVERY, WARM_STEPS, LazyMAR
from studio.decoding.masked_runs import MaskedRun, MaskedSampler
from studio.decoding.sampling import Fillable, KnownTokens, OnStep, Sampled
from studio.errors import StudioError
from studio.models.masked_autoencoder import Masked, MaskedAutoencoder


class Step(NamedTuple):
    """Samples the entries `first` to `last` - 1 of each order; those from `last` on are known.

    `progress` is the share of tokens that the schedule counts as known, which guidance grows with.
    """

    first: int
    last: int
    progress: float


def last_steps(plan: list[Step], unknown: int | None) -> list[Step]:
    """The last steps of a plan, which sample `unknown` tokens; all of it for None."""
    if unknown is None:
        return plan
    return [step._replace(last=min(step.last, unknown)) for step in plan if step.first < unknown]


@dataclass(frozen=True, kw_only=True)
class MaskedSteps(Fillable):
    """Settings of a masked loop.

    Args:
        steps: calls of the transformer, 1 to the number of tokens; None leaves it to whoever samples.
        guidance_schedule: "linear" lets guidance grow with the share of known tokens, "constant" does not; None leaves
            it to whoever samples.

    Raises:
        StudioError: for a value outside these.
    """

    steps: int | None = None
    guidance_schedule: str | None = None

    DEFAULTS: ClassVar[dict[str, Any]] = {"steps": 64, "guidance_schedule": "linear"}

    @property
    def joins(self) -> bool:
        """Whether requests with these settings may share calls with others that are not equally far."""
        return True

    def __post_init__(self) -> None:
        if self.steps is not None:
            set_fields(self, steps=check_integer("steps", self.steps, 1))
        check_schedule(self.guidance_schedule)

    def plan(self, total: int, unknown: int | None = None) -> list[Step]:
        """The steps that sample `total` tokens, for settings that are filled.

        With only so many unknown, these are the last steps, which sample as many.
        """
        assert self.steps is not None
        if self.steps > total:
            raise StudioError(f"An image has {total} tokens: sample them in at most as many steps, not {self.steps}.")
        plan, last = [], total
        for number in range(1, self.steps + 1):
            left = max(1, min(last - 1, math.floor(total * math.cos(math.pi / 2 * number / self.steps))))
            plan.append(Step(0 if number == self.steps else left, last, (total - left) / total))
            last = left
        return last_steps(plan, unknown)

    def scale_at(self, step: Step, guidance_scale: float) -> float:
        """The guidance of a step."""
        return scheduled_scale(self.guidance_schedule, guidance_scale, step.progress)


ORDERS = ("random", "gtr")
CACHES = ("none", "lazy")
_LAST_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class MaskedAutoregressive(MaskedSteps):
    """Settings of the loop: those of `MaskedSteps`, and

    Args:
        diffusion_steps: denoising steps of a token, 1 to 1000; None leaves it to whoever samples.
        order: "random", or "gtr", a coarse grid of tokens first and what lies between them last, in few calls
            (`studio.decoding.gtr`).
        annealing: "none", or how the number of denoising steps falls from `diffusion_steps` at the first call of the
            transformer to `last_diffusion_steps` at the last one (`studio.decoding.disa`): "linear", "cosine" or
            "two-stage".
        last_diffusion_steps: 1 to `diffusion_steps`; 5 if None, or all of them if they are fewer; with annealing only.
        cache: "none", or "lazy": most calls of the transformer recompute a part (`studio.decoding.lazy_mar`).
        refresh_every: from one full call to the next, at least 1; 9 if None; with a cache only.
        warm_steps: how many calls are full before that count begins, 0 or more; 5 if None; with a cache only.

    Raises:
        StudioError: for a value outside these, and for settings of what is off.
    """

    diffusion_steps: int | None = None
    order: str = "random"
    annealing: str = "none"
    last_diffusion_steps: int | None = None
    cache: str = "none"
    refresh_every: int | None = None
    warm_steps: int | None = None

    DEFAULTS: ClassVar[dict[str, Any]] = {**MaskedSteps.DEFAULTS, "diffusion_steps": 100}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diffusion_steps", "last_diffusion_steps"):
            if (value := getattr(self, name)) is not None:
                set_fields(self, **{name: check_integer(name, value, 1, 1000)})
        check_choice("order", self.order, ORDERS)
        check_choice("annealing", self.annealing, ("none", *ANNEALINGS))
        check_choice("cache", self.cache, CACHES)
        if self.annealing == "none" and self.last_diffusion_steps is not None:
            raise StudioError(f"last_diffusion_steps goes with annealing ({', '.join(ANNEALINGS)}): give one.")
        for name, default, least in (("refresh_every", REFRESH_EVERY, 1), ("warm_steps", WARM_STEPS, 0)):
            value = getattr(self, name)
            if self.cache == "none" and value is not None:
                raise StudioError(f'{name} goes with cache="lazy": give it too, or leave {name} out.')
            if self.cache != "none":
                set_fields(self, **{name: check_integer(name, default if value is None else value, least)})

    @property
    def mar_only(self) -> list[str]:
        """What is set that only `masked_autoregressive` can follow."""
        named = {"annealing": "annealing (DiSA)", "cache": "the cache (LazyMAR)"}
        return [text for name, text in named.items() if getattr(self, name) != "none"]

    @property
    def joins(self) -> bool:
        """As of `MaskedSteps`; what a cache holds is of one call."""
        return self.cache == "none"

    @property
    def approximate(self) -> bool:
        """Whether images do not follow the distribution that the model has with these steps in this order."""
        return bool(self.mar_only)

    def plan(self, total: int, unknown: int | None = None) -> list[Step]:
        """As of `MaskedSteps`, in the order that is set."""
        plan = super().plan(total, unknown)
        if self.order == "random":
            return plan
        sets = gtr_sets(math.isqrt(total))
        assert self.steps is not None
        if self.steps < (least := len(sets.unique())):
            raise StudioError(
                f"The order gtr takes at least {least} steps here, not {self.steps}: a step for each set."
            )
        plan, last = [], total
        for count in gtr_counts(sets, self.steps):
            plan.append(Step(last - count, last, (total - last + count) / total))
            last -= count
        return last_steps(plan, unknown)

    def ordered(self, order: torch.Tensor) -> torch.Tensor:
        """A random order (B, L) of positions, as `plan` counts on it."""
        return order if self.order == "random" else gtr_order(order, gtr_sets(math.isqrt(order.shape[1])))

    def denoising_plan(self) -> list[int]:
        """Denoising steps of the tokens of each step, for settings that are filled."""
        steps, most = self.steps, self.diffusion_steps
        assert steps is not None and most is not None
        if self.annealing == "none":
            return [most] * steps
        last = min(_LAST_STEPS, most) if self.last_diffusion_steps is None else self.last_diffusion_steps
        if last > most:
            raise StudioError(f"last_diffusion_steps must be at most diffusion_steps, {most}, not {last}.")
        return annealed_steps(self.annealing, steps, most, last)


@dataclass
class MaskedOutput(Sampled):
    """As of `Sampled`, but `tokens` (B, L, D) are float32, and `seconds` holds "transformer" and "head"."""


def start_masked(
    model: MaskedAutoencoder, noise: PositionNoise, known: KnownTokens | None, settings: MaskedAutoregressive
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The order (B, L) of positions, the tokens (B, L, D) at the start, 0 where unknown, and how many are unknown."""
    order = settings.ordered(noise.order(model.num_tokens))
    with torch.inference_mode(False), torch.no_grad():  # so that torch counts how often tokens are written to
        tokens = torch.zeros(*order.shape, model.config.token_dim, device=model.device)
        if known is None:
            return order, tokens, model.num_tokens
        return known.known_last(order), known.write(tokens), known.unknown


def scatter_tokens(tokens: torch.Tensor, places: TokenIndex, values: torch.Tensor) -> None:
    """Writes values (n, D) into tokens (B, L, D)."""
    tokens[places.images, places.positions] = values


@dataclass(eq=False, kw_only=True)
class MARRun(MaskedRun):
    """As of `MaskedRun`.

    Attributes:
        order: of positions (B, L).
        buffer: of the transformer.
        denoising: steps of the tokens of each step.
        latest_time: of their schedules.
        lazy: what remembers earlier calls of the transformer; it goes with a run that is alone.
        written: the version of `tokens` after the last step.
    """

    settings: MaskedAutoregressive
    plan: list[Step]
    temperature: float
    noise: PositionNoise
    order: torch.Tensor
    buffer: torch.Tensor
    denoising: list[int]
    latest_time: int | None = None
    lazy: LazyMAR | None = None
    written: int = field(default=0, init=False)

    @property
    def next_places(self) -> TokenIndex:
        """What the next step samples."""
        step = self.plan[self.number]
        return TokenIndex.of(self.order[:, step.first : step.last])

    @property
    def reported(self) -> tuple[torch.Tensor, ...]:
        """Tokens, and the positions that the last step sampled."""
        step = self.plan[self.number - 1]
        return self.tokens, self.order[:, step.first : step.last]

    @property
    def known(self) -> torch.Tensor:
        """As of `MaskedRun`."""
        none = torch.zeros(self.order.shape, dtype=torch.bool, device=self.order.device)
        return none.scatter_(1, self.order[:, self.order.shape[1] - self.final :], True)

    @property
    def final(self) -> int:
        """As of `MaskedRun`."""
        return self.order.shape[1] - (self.plan[self.number - 1].first if self.number else self.plan[0].last)


class MARSampler(MaskedSampler[MARRun]):
    """A `MAR` at work. Runs share the calls of the head, too, where they denoise in the same steps."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model, self.heads = model, TimedHeads(model)

    @torch.no_grad()
    def start(
        self,
        condition: dict,
        *,
        generators: list[torch.Generator],
        sampling: float,
        guidance_scale: float,
        settings: MaskedAutoregressive,
        noise: PositionNoise | None = None,
        known: KnownTokens | None = None,
    ) -> MARRun:
        """As of `MaskedSampler`; `sampling` is the temperature, the rest as of `masked_autoregressive`."""
        model = self.model
        noise = noise or PositionNoise.of(generators, model.config.token_dim, model.device)
        order, tokens, unknown = start_masked(model, noise, known, settings)
        plan, denoising = settings.plan(model.num_tokens, unknown), settings.denoising_plan()
        run = MARRun(
            tokens=tokens,
            guidance_scale=guidance_scale,
            settings=settings,
            plan=plan,
            temperature=check_number("temperature", sampling),
            noise=noise,
            order=order,
            buffer=condition_rows(model, condition, guided=guidance_scale != 1)[0],
            denoising=denoising[-len(plan) :],
            latest_time=LATEST_TIME if model.diffloss.limit is None and len(set(denoising)) > 1 else None,
        )
        if settings.cache == "lazy":
            assert settings.refresh_every is not None and settings.warm_steps is not None
            run.lazy = LazyMAR(
                model, run.buffer, order, plan, settings.refresh_every, settings.warm_steps, settings.steps
            )
        return run

    def predict(self, runs: Sequence[MARRun]) -> list[torch.Tensor]:
        """Conditions (S, n, C) of the tokens that each run samples next."""
        if lazy := runs[0].lazy:
            return [self._remembered(runs[0], lazy).flatten(1, 2)]
        parts = []
        for run in runs:
            step, tokens = run.plan[run.number], run.tokens.to(run.buffer.dtype)
            parts.append(Masked(tokens, run.order[:, step.last :], run.order[:, step.first : step.last], run.buffer))
        self.rows += sum(len(run.buffer) for run in runs)
        return [each.flatten(1, 2) for each in self.model.conditions_together(parts)]

    def _remembered(self, run: MARRun, lazy: LazyMAR) -> torch.Tensor:
        if run.number and run.tokens._version != run.written:
            lazy.forget()
        self.rows += lazy.next_rows
        return lazy.conditions(run.tokens.to(run.buffer.dtype))

    def sample(self, runs: Sequence[MARRun], predicted: list[torch.Tensor]) -> None:
        """As of `MaskedSampler`."""
        groups = defaultdict(list)
        for run, conditions in zip(runs, predicted):
            groups[run.denoising[run.number], run.latest_time, len(conditions)].append((run, conditions))
        for (steps, latest_time, _), group in groups.items():
            self._denoise(self.heads.of(steps, latest_time), [run for run, _ in group], [each for _, each in group])

    def _denoise(self, head: TimedHead, runs: Sequence[MARRun], conditions: list[torch.Tensor]) -> None:
        """The tokens of runs that denoise in the same steps, in as many calls of the head."""
        places = [run.next_places for run in runs]
        counts = [len(each.images) for each in places]
        scales = [run.settings.scale_at(run.plan[run.number], run.guidance_scale) for run in runs]
        kernels = ReverseTransitions(head, torch.cat(conditions, dim=1), _of_tokens(scales, counts, self.model))
        start = torch.cat([run.noise.start(each) for run, each in zip(runs, places)])
        noise = torch.cat([run.noise.steps(each, kernels.steps) for run, each in zip(runs, places)], dim=1)
        temperature = _of_tokens([run.temperature for run in runs], counts, self.model)
        for _, _, mean, _ in denoise(kernels, start, noise, temperature):
            tokens = mean
        for run, each, values in zip(runs, places, tokens.split(counts)):
            scatter_tokens(run.tokens, each, values)
            run.written = run.tokens._version


def _of_tokens(values: list[float], counts: list[int], model: MaskedAutoencoder) -> float | torch.Tensor:
    """A number of each run for all its tokens (n, 1), or one number where it is the same for all."""
    if len(set(values)) == 1:
        return values[0]
    each = torch.tensor(values, device=model.device)
    return each.repeat_interleave(torch.tensor(counts, device=model.device))[:, None]


@torch.no_grad()
def masked_autoregressive(
    model: MaskedAutoencoder,
    condition: dict,
    *,
    generators: list[torch.Generator] | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    settings: MaskedAutoregressive | None = None,
    on_step: OnStep | None = None,
    noise: PositionNoise | None = None,
    known: KnownTokens | None = None,
) -> MaskedOutput:
    """Samples all tokens of B images.

    Args:
        model: a `MAR` in evaluation mode.
        condition: `{"class_labels": (B,)}`.
        generators: one per image; an image does not depend on the others.
        guidance_scale: at its greatest; 1 is no guidance.
        temperature: multiplies the standard deviation of every denoising step, at least 0.
        on_step: called as (number of the step, tokens (B, L, D) which may be written to, positions (B, k) that it
            sampled); True stops the loop. Tokens not yet sampled are 0.
        noise: random numbers in place of the generators'.
        known: tokens (B, L, D) that are not sampled; the others are, given these.

    Raises:
        StudioError: for more steps than tokens and for a temperature that is none.
    """
    settings, sampler = (settings or MaskedAutoregressive()).filled(), MARSampler(model)
    run = sampler.start(
        condition,
        generators=generators or [],
        sampling=temperature,
        guidance_scale=guidance_scale,
        settings=settings,
        noise=noise,
        known=known,
    )
    sampler.finish(run, on_step)
    return MaskedOutput(run.tokens, run.number, sampler.rows, sampler.seconds)
