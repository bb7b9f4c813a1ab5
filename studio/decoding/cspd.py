"""Continuous speculative decoding: a small MAR drafts tokens, the large one verifies them.

"Continuous Speculative Decoding for Autoregressive Image Generation" (arXiv:2411.11925). Two modes:

- "exact" keeps the target's distribution. The draft samples the tokens of one step; the target scores the whole
  denoising paths in one call of its head (`speculative_diffusion`), instead of walking them step by step. The token is
  the target's last mean of a verified path, so what the next step is conditioned on is known only when this step is
  done: nothing is drafted past a token that is not verified, and each step needs one call of the target's transformer.
- "relaxed" is the authors' scheme (sections 3.2 to 3.4): the draft runs ahead for `draft_steps` steps, and the target
  denoises all their tokens at once, with the same noise, to compare the ends of the paths. With one noise the exponents
  of the steps before the last are taken to cancel; a ratio of their widths remains, beside the two densities of the
  last step, whose exponents an inner temperature flattens. It is approximate: images do not follow the target's
  distribution, even without an inner temperature.

In both, the target samples the first tokens itself (section 3.3), and both models use the same noise at a position.

Deviations from the authors' code in "relaxed", all but the first undone by `studio.reference.cspd`: sums of logs in
float64, where products of small widths underflow; the ratio of widths has the sign of a density ratio; only rejected
tokens are sampled anew, each once; one that no trial accepts is sampled from the target, where the authors leave zeros;
the target judges a token with the guidance of the step that drafted it, not with that of the block's last step.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from studio.checks import check_choice, check_integer, check_number, set_fields
from studio.decoding.autoregressive import condition_rows
from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.denoising import ReverseTransitions, TimedHeads, denoise
from studio.decoding.mar import MaskedAutoregressive, MaskedOutput, Step, scatter_tokens, start_masked
from studio.decoding.sampling import KnownTokens, OnStep
from studio.decoding.speculative_diffusion import log_density, trace, verify_path
from studio.errors import StudioError
from studio.models.masked_autoencoder import MaskedAutoencoder


@dataclass
class FinalStep:
    """The ends of n paths.

    Args:
        mean, std: of the last step, (n, D), with temperature.
        widths: logs of the standard deviations of all steps before, summed, (n, D), without temperature.
    """

    mean: torch.Tensor
    std: torch.Tensor
    widths: torch.Tensor

    @classmethod
    def of(cls, steps: Iterable, temperature: float) -> "FinalStep":
        """Those of the steps that `denoise` yields."""
        widths, ended = 0.0, None
        for step, _, mean, log_std in steps:
            if step:
                widths = widths + log_std
            else:
                ended = cls(mean, temperature * log_std.exp(), widths + torch.zeros_like(mean))
        assert ended is not None
        return ended

    def take(self, rows: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> "FinalStep":
        """Those of some of the paths."""
        return FinalStep(self.mean[rows], self.std[rows], self.widths[rows])


@dataclass
class Resampled:
    """Tokens (m, D) in place of rejected ones, rounds of trials, and which of them (m,) no trial accepted."""

    tokens: torch.Tensor
    rounds: int
    fallbacks: torch.Tensor


@dataclass(frozen=True)
class AlignedAcceptance:
    """The tests of "relaxed" mode: draft and target denoised a token with the same noise, and their ends are compared.

    Args:
        inner_temperature: flattens the last step's densities, above 0.
        max_rounds: trials for a rejected token.
    """

    inner_temperature: float
    max_rounds: int

    keeps_scales = True
    """Whether the target judges a token with the guidance of the step that drafted it."""

    def log_width_ratio(self, target: FinalStep, draft: FinalStep) -> torch.Tensor:
        """Log (n,), float64, of what the widths of the steps before the last make of the ratio of paths."""
        return (draft.widths.double() - target.widths.double()).sum(dim=1)

    def log_ratio(self, x: torch.Tensor, target: FinalStep, draft: FinalStep) -> torch.Tensor:
        """Log ratio (n,), float64; the draft x (n, D) is accepted if it exceeds the log of a uniform number."""
        ratio = self.log_width_ratio(target, draft)
        for ends, sign in ((target, 1), (draft, -1)):
            std = ends.std.double()
            exponent = ((x.double() - ends.mean.double()) / (std * self.inner_temperature)).square() / 2
            ratio = ratio - sign * (exponent + std.log()).sum(dim=1)
        return ratio

    def trial_chance(self, x: torch.Tensor, target: FinalStep, draft: FinalStep) -> torch.Tensor:
        """The chance (n,), float64, that a trial x (n, D), sampled from the target's last step, is accepted."""
        theirs, drafts = (log_density(x, ends.mean, ends.std.double().log()) for ends in (target, draft))
        excess = drafts - theirs - self.log_width_ratio(target, draft)
        return -torch.expm1(excess.clamp(max=0))

    def resample(
        self, target: FinalStep, draft: FinalStep, places: TokenIndex, noise: PositionNoise, rejected: torch.Tensor
    ) -> Resampled:
        """Samples for the tokens `rejected` (m,) of n: trials from the target's last step, `max_rounds` for each."""
        target, draft, places = target.take(rejected), draft.take(rejected), places.take(rejected)
        tokens, pending, rounds = target.mean.clone(), torch.arange(len(target.mean), device=target.mean.device), 0
        fallbacks = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        while len(pending) and rounds < self.max_rounds:
            theirs, drafts = target.take(pending), draft.take(pending)
            normal, uniform = noise.trial(places.take(pending), rounds)
            trial = theirs.mean + theirs.std * normal
            passed = uniform < self.trial_chance(trial, theirs, drafts)
            tokens[pending[passed]] = trial[passed]
            pending, rounds = pending[~passed], rounds + 1
        normal, _ = noise.trial(places.take(pending), self.max_rounds)
        tokens[pending] = target.mean[pending] + target.std[pending] * normal
        fallbacks[pending] = True
        return Resampled(tokens, rounds, fallbacks)


MODES = ("exact", "relaxed")
VALIDATED_DRAFT_STEPS = 4
MAX_ROUNDS = 10_000
_RELAXED = {"draft_steps": 4, "inner_temperature": 42.0, "max_rounds": 100}


@dataclass(frozen=True, kw_only=True)
class ContinuousSpeculative(MaskedAutoregressive):
    """Settings of continuous speculative decoding; those of `MaskedAutoregressive`, and

    Args:
        mode: "exact", or "relaxed", which is approximate.
        prefill: share of the steps that the target samples itself, 0 to 1; the first step always is.
        draft_steps: steps that the draft runs ahead; 4 if None; "relaxed" only.
        inner_temperature: flattens the last step's densities in the test, above 0; 42 if None; "relaxed" only.
        max_rounds: trials for a rejected token, 1 to 10,000; 100 if None; "relaxed" only.

    Raises:
        StudioError: for a value outside these, and for a setting of "relaxed" in "exact" mode.
    """

    mode: str = "exact"
    prefill: float = 0.05
    draft_steps: int | None = None
    inner_temperature: float | None = None
    max_rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if refused := self.mar_only:
            raise StudioError(
                f"{' and '.join(refused)} cannot go with continuous speculative decoding, which hides tokens again and "
                "denoises draft and target in equally many steps: sample with MaskedAutoregressive (mar) instead."
            )
        check_choice("mode", self.mode, MODES)
        set_fields(self, prefill=check_number("prefill", self.prefill, 0, 1))
        if self.mode == "exact":
            given = [name for name in _RELAXED if getattr(self, name) is not None]
            if given:
                raise StudioError(f'{", ".join(given)} goes with mode="relaxed" only: leave it out.')
            return
        filled = {name: value if (value := getattr(self, name)) is not None else _RELAXED[name] for name in _RELAXED}
        set_fields(
            self,
            draft_steps=check_integer("draft_steps", filled["draft_steps"], 1),
            inner_temperature=check_number("inner_temperature", filled["inner_temperature"], above=True),
            max_rounds=check_integer("max_rounds", filled["max_rounds"], 1, MAX_ROUNDS),
        )

    @property
    def joins(self) -> bool:
        """As of `MaskedSteps`; drafts are verified with those of the same call."""
        return False

    @property
    def acceptance(self) -> AlignedAcceptance:
        """The tests of "relaxed" mode."""
        assert self.inner_temperature is not None and self.max_rounds is not None
        return AlignedAcceptance(self.inner_temperature, self.max_rounds)

    @property
    def approximate(self) -> bool:
        """Whether images do not follow the target's distribution."""
        return self.mode == "relaxed"

    def validation_warning(self, total: int) -> str | None:
        """What is outside the settings that the authors validated "relaxed" with, for images of `total` tokens.

        They sample a token a step, with drafts of four steps at most; with longer drafts in fewer steps images distort.
        """
        if not self.approximate:
            return None
        outside = []
        if self.steps is not None and self.steps < total:
            outside.append(f"{self.steps} steps for {total} tokens (validated: {total})")
        if self.draft_steps is not None and self.draft_steps > VALIDATED_DRAFT_STEPS:
            outside.append(f"drafts of {self.draft_steps} steps (validated: at most {VALIDATED_DRAFT_STEPS})")
        return (
            f"Relaxed decoding was not validated with {' and '.join(outside)}: compare with exact." if outside else None
        )


@dataclass
class ContinuousOutput(MaskedOutput):
    """As of `MaskedOutput`, but `seconds` holds "target" and "draft".

    `from_draft` (B, L) bool marks the tokens whose draft was accepted. `tested` and `accepted` count tokens, `trials`
    rounds (relaxed) or single trials (exact) of sampling anew, and `fallbacks` rejected tokens that no trial accepted.
    """

    from_draft: torch.Tensor | None = None
    draft_calls: int = 0
    tested: int = 0
    accepted: int = 0
    trials: int = 0
    fallbacks: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return self.accepted / max(1, self.tested)


@torch.no_grad()
def continuous_speculative(
    model: MaskedAutoencoder,
    condition: dict,
    *,
    draft: MaskedAutoencoder,
    generators: list[torch.Generator] | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    settings: ContinuousSpeculative | None = None,
    on_step: OnStep | None = None,
    on_draft: OnStep | None = None,
    noise: PositionNoise | None = None,
    known: KnownTokens | None = None,
) -> ContinuousOutput:
    """Samples all tokens of B images.

    Args:
        model: the target, a `MAR` in evaluation mode.
        condition, generators, guidance_scale, noise, known: as of `masked_autoregressive`, of both models.
        draft: a `MAR` over the same tokens.
        temperature: as of `masked_autoregressive`, above 0.
        on_step: called as (step, tokens (B, L, D), positions (B, k)) when the tokens at these positions are final,
            those of several steps where these were verified together; True stops the loop.
        on_draft: the same, when the draft sampled tokens, which are not final.

    Returns:
        The tokens and what they cost.

    Raises:
        StudioError: for models over different tokens, more steps than tokens, fewer than two denoising steps, and a
            temperature of 0.
    """
    settings = (settings or ContinuousSpeculative()).filled()
    check_pair(model, draft, settings, temperature)
    noise = noise or PositionNoise.of(generators or [], model.config.token_dim, model.device)
    return _Run(
        model, draft, condition, noise, guidance_scale, temperature, settings, on_step, on_draft, known
    ).sample()


def check_pair(
    model: MaskedAutoencoder, draft: MaskedAutoencoder, settings: ContinuousSpeculative, temperature: float
) -> None:
    """Raises the `StudioError` that `continuous_speculative` would raise for these, with settings that are filled."""
    check_number("temperature", temperature)
    if temperature == 0:
        raise StudioError("A temperature of 0 leaves nothing to verify: sample with MaskedAutoregressive instead.")
    if settings.diffusion_steps is not None and settings.diffusion_steps < 2:
        raise StudioError("A single denoising step leaves nothing to verify: take two diffusion_steps at least.")
    ours, theirs = ((m.num_tokens, m.config.token_dim, m.config.patch_size) for m in (model, draft))
    if ours != theirs:
        raise StudioError(
            f"Draft and target must sample the same tokens; the target has {ours[0]} of {ours[1]} numbers in patches "
            f"of {ours[2]}, the draft {theirs[0]} of {theirs[1]} in patches of {theirs[2]}."
        )


class _Stepper:
    """A `MAR` at work on the images of one call: its conditions, its heads, and what it costs."""

    def __init__(self, model: MaskedAutoencoder, condition: dict, guided: bool) -> None:
        self.model, self.heads = model, TimedHeads(model)
        self.buffer, _ = condition_rows(model, condition, guided=guided)
        self.calls = self.rows = 0

    def kernels(
        self, tokens: torch.Tensor, order: torch.Tensor, step: Step, scale: float | torch.Tensor, diffusion_steps: int
    ) -> ReverseTransitions:
        """What the model makes of the known tokens: the kernels of the entries that the step samples, in their
        order.
        """
        visible, wanted = order[:, step.last :], order[:, step.first : step.last]
        conditions = self.model.conditions(tokens.to(self.buffer.dtype), visible, wanted, self.buffer)
        self.calls += 1
        self.rows += len(self.buffer)
        return ReverseTransitions(self.heads.of(diffusion_steps), conditions.flatten(1, 2), scale)


class _Run:
    """The images of one call: order, tokens, both models, and in "relaxed" the ends of drafts not yet verified."""

    def __init__(
        self, model, draft, condition, noise, guidance_scale, temperature, settings, on_step, on_draft, known
    ) -> None:  # fmt: skip
        self.settings, self.temperature, self.guidance_scale = settings, temperature, guidance_scale
        self.noise, self.on_step, self.on_draft = noise, on_step, on_draft
        self.began = time.perf_counter()
        guided = guidance_scale != 1
        self.target, self.draft = (_Stepper(m, condition, guided) for m in (model, draft))
        self.order, self.tokens, self.verified = start_masked(model, noise, known, settings)
        self.plan = settings.plan(model.num_tokens, self.verified)
        self.ends = FinalStep(*(torch.zeros_like(self.tokens) for _ in range(3)))
        self.scales = torch.zeros(*self.order.shape, 1, device=model.device)
        self.drafting = 0.0
        from_draft = torch.zeros(self.order.shape, dtype=torch.bool, device=model.device)
        self.sampled = ContinuousOutput(self.tokens, from_draft=from_draft)

    def sample(self) -> ContinuousOutput:
        verify = {"exact": self._exact_step, "relaxed": self._relaxed_step}[self.settings.mode]
        for number, step in enumerate(self.plan):
            if number <= self.settings.steps * self.settings.prefill:
                stopped = self._target_step(number, step)
            else:
                stopped = verify(number, step)
            if stopped:
                break
        sampled, seconds = self.sampled, time.perf_counter() - self.began
        sampled.target_calls, sampled.row_calls = self.target.calls, self.target.rows
        sampled.draft_calls = self.draft.calls
        sampled.seconds = {"target": seconds - self.drafting, "draft": self.drafting}
        return sampled

    def _target_step(self, number: int, step: Step) -> bool:
        places, steps = self._denoise(self.target, step)
        scatter_tokens(self.tokens, places, [mean for _, _, mean, _ in steps][-1])
        self.verified = step.first
        return self._stopped(self.on_step, number, step)

    def _exact_step(self, number: int, step: Step) -> bool:
        entered = time.perf_counter()
        kernels = self._kernels(self.draft, step)
        places = self._places(step)
        path = trace(kernels, self.noise.start(places), self._step_noise(places), self.temperature)
        scatter_tokens(self.tokens, places, path.means[0])
        self.drafting += time.perf_counter() - entered
        if self._stopped(self.on_draft, number, step):
            return True
        verified = verify_path(path, self._kernels(self.target, step), places, self.noise, self.temperature)
        scatter_tokens(self.tokens, places, verified.tokens)
        self._count(places, verified.accepted)
        self.sampled.trials += verified.trials
        return self._stopped(self.on_step, number, step)

    def _relaxed_step(self, number: int, step: Step) -> bool:
        entered = time.perf_counter()
        places, steps = self._denoise(self.draft, step)
        ends = FinalStep.of(steps, self.temperature)
        for kept, new in ((self.tokens, ends.mean), (self.ends.mean, ends.mean), (self.ends.std, ends.std),
                          (self.ends.widths, ends.widths)):  # fmt: skip
            scatter_tokens(kept, places, new)
        self.scales[places.images, places.positions] = self.settings.scale_at(step, self.guidance_scale)
        self.drafting += time.perf_counter() - entered
        stopped = self._stopped(self.on_draft, number, step)
        if stopped or (number % self.settings.draft_steps and number + 1 < len(self.plan)):
            return stopped
        return self._verify_block(number, Step(step.first, self.verified, step.progress))

    def _verify_block(self, number: int, block: Step) -> bool:
        """Tests all tokens that the draft sampled since the last test, together."""
        rule, places = self.settings.acceptance, self._places(block)
        at = (places.images, places.positions)
        _, steps = self._denoise(self.target, block, self.scales[at] if rule.keeps_scales else None)
        target, draft = FinalStep.of(steps, self.temperature), self.ends.take(at)
        accepted = rule.log_ratio(self.tokens[at], target, draft) > self.noise.test(places).double().log()
        self._count(places, accepted)
        if not accepted.all():
            rejected = torch.nonzero(~accepted)[:, 0]
            resampled = rule.resample(target, draft, places, self.noise, rejected)
            scatter_tokens(self.tokens, places.take(rejected), resampled.tokens)
            self.sampled.trials += resampled.rounds
            self.sampled.fallbacks += int(resampled.fallbacks.sum())
        self.verified = block.first
        return self._stopped(self.on_step, number, block)

    def _denoise(self, stepper: _Stepper, step: Step, scales: torch.Tensor | None = None):
        """The places of a step and the denoising steps of its tokens, lazily."""
        kernels, places = self._kernels(stepper, step, scales), self._places(step)
        return places, denoise(kernels, self.noise.start(places), self._step_noise(places), self.temperature)

    def _kernels(self, stepper: _Stepper, step: Step, scales: torch.Tensor | None = None):
        scale: Any = self.settings.scale_at(step, self.guidance_scale) if scales is None else scales
        assert self.settings.diffusion_steps is not None
        return stepper.kernels(self.tokens, self.order, step, scale, self.settings.diffusion_steps)

    def _step_noise(self, places: TokenIndex) -> torch.Tensor:
        return self.noise.steps(places, self.settings.diffusion_steps)

    def _places(self, step: Step) -> TokenIndex:
        return TokenIndex.of(self.order[:, step.first : step.last])

    def _count(self, places: TokenIndex, accepted: torch.Tensor) -> None:
        assert self.sampled.from_draft is not None
        self.sampled.from_draft[places.images, places.positions] = accepted
        self.sampled.tested += len(accepted)
        self.sampled.accepted += int(accepted.sum())

    def _stopped(self, callback: OnStep | None, number: int, step: Step) -> bool:
        """Reports the tokens of a step; whether to stop."""
        return callback is not None and bool(callback(number, self.tokens, self.order[:, step.first : step.last]))
