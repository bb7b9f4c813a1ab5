"""Continuous speculative decoding: a small MAR drafts tokens, the large one verifies them.

"Continuous Speculative Decoding for Autoregressive Image Generation" (arXiv:2411.11925). Two modes:

- "exact" keeps the target's distribution. The draft samples the tokens of one step; the target scores the whole
denoising paths in
  one call of its head (`path_verification`), instead of walking them step by step. The token is the target's last mean
  of a verified path, so what the next step is conditioned on is known only when this step is done: nothing is drafted
  past a token that is not verified, and each step needs one call of the target's transformer.
- "relaxed" is the authors' scheme (`aligned_acceptance`): the draft runs ahead for `draft_steps` steps, and the target
  samples all their tokens at once, with the same noise, to compare the ends of the paths. It is approximate: images do
  not follow the target's distribution.

In both, the target samples the first tokens itself (section 3.3), and both models use the same noise at a position.

Deviations from the authors' code in "relaxed", undone by `reference=True`: the target judges a token with the guidance
of the step that drafted it, where the authors take that of the block's last step; and those of `aligned_acceptance`.

Acceptance of continuous speculative decoding: draft and target denoise a token with the same noise, and the ends of
the two paths are compared.

"Continuous Speculative Decoding for Autoregressive Image Generation" (arXiv:2411.11925), sections 3.2 to 3.4. With one
noise the exponents of the steps before the last are taken to cancel; a ratio of their widths remains, beside the two
densities of the last step, whose exponents an inner temperature flattens.

The result is approximate: tokens do not follow the target's distribution, even without an inner temperature.
`path_verification` is the exact scheme.

Deviations from the authors' code, all but the first undone by `reference=True`: sums of logs in float64, where
products of small widths underflow; the ratio of widths has the sign of a density ratio; only rejected tokens are
sampled anew, each once; one that no trial accepts is sampled from the target, where the authors leave zeros.

Exact speculative sampling of denoising paths: a draft's path is tested step by step, and mended where it fails.

Speculative sampling (arXiv:2211.17192, algorithm 1) applied to the chain of Gaussian reverse kernels of a diffusion
model, as "Accelerated Diffusion Models via Speculative Sampling" (arXiv:2501.05370) does within one image. The
target's kernels at all states of the draft's path come from one call. From the first step down, the outcome x of a step
passes with probability min(1, p(x) / q(x)); the first that fails is sampled anew from the rest of the target's kernel,
max(0, p - q) normalised, and the target walks the steps below. Step 0 has no noise: its mean under the target, never
the draft's, is the token. So tokens follow the target's distribution, whatever the draft.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from studio.checks import check_choice, check_flag, check_integer, check_number, set_fields
from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.mar import MARStepper, MaskedAutoregressive, MaskedOutput, ReverseTransitions, Step, denoise, put
from studio.errors import StudioError

_TRIALS_AT_ONCE = 4096
_MOST_TRIALS = 2**20


class Path(NamedTuple):
    """How n tokens were denoised, by step: the states (T, n, D) that steps 0 to T - 1 began from, the means of the
    draft's kernels there and the logs of their standard deviations, without temperature."""

    states: torch.Tensor
    means: torch.Tensor
    log_stds: torch.Tensor


class Verdict(NamedTuple):
    """Tokens (n, D) of the target's distribution, which of them (n,) kept the draft's whole path, and trials for the
    others."""

    tokens: torch.Tensor
    accepted: torch.Tensor
    trials: int


def trace(kernels: ReverseTransitions, start: torch.Tensor, noise: torch.Tensor, temperature: float = 1.0) -> Path:
    """The path from x_T (n, D) with noise (T, n, D), by step."""
    steps = [parts[1:] for parts in denoise(kernels, start, noise, temperature)]
    return Path(*(torch.stack(parts[::-1]) for parts in zip(*steps)))


def log_density(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log density of a diagonal Gaussian (..., D), summed over D in float64, without the constant."""
    mean, log_std = mean.double(), log_std.double()
    return -(0.5 * ((x.double() - mean) * (-log_std).exp()).square() + log_std).sum(dim=-1)


def verify_path(
    path: Path, target: ReverseTransitions, places: TokenIndex, noise: PositionNoise, temperature: float = 1.0
) -> Verdict:
    """Tokens of the target's distribution from a draft's path.

    Args:
        path: sampled with `noise.start(places)`, `noise.steps(places, T)` and this temperature.
        target: kernels of the same tokens.
        noise: its tests decide. Below a step that failed, the noise of the steps is used again, which no test has seen.
        temperature: above 0.

    Errors: `StudioError` when a rest is too small to be sampled from, which rounding alone can bring about.
    """
    scaling = torch.tensor(temperature, dtype=torch.float64).log()
    means, log_stds = target.along(path.states, 0)
    total = len(path.states)
    if total == 1:
        return Verdict(means[0], torch.ones(len(means[0]), dtype=torch.bool, device=means.device), 0)
    outcomes = path.states[:-1]
    theirs = log_density(outcomes, means[1:], log_stds[1:] + scaling)
    drafts = log_density(outcomes, path.means[1:], path.log_stds[1:] + scaling)
    steps = torch.arange(1, total, device=means.device)[:, None]
    fails = noise.test(places, steps).double().log() > theirs - drafts
    failed_at = torch.where(fails, steps, 0).amax(dim=0)
    accepted = failed_at == 0
    tokens, trials = means[0].clone(), 0
    rows = torch.nonzero(~accepted)[:, 0]
    if len(rows):
        rows = rows[failed_at[rows].argsort(descending=True)]
        at, mended = failed_at[rows], places.take(rows)
        p = (means[at, rows], log_stds[at, rows] + scaling)
        q = (path.means[at, rows], path.log_stds[at, rows] + scaling)
        x, trials = sample_rest(p, q, mended, noise, at)
        tokens[rows] = _finish(target.take(rows), x, at, noise.steps(mended, total), temperature)
    return Verdict(tokens, accepted, trials)


def sample_rest(p, q, places: TokenIndex, noise: PositionNoise, step: int | torch.Tensor) -> tuple[torch.Tensor, int]:
    """Samples (n, D) from max(0, p - q), normalised, and the number of trials they took.

    Args:
        p, q: Gaussians (mean, log of the standard deviation), (n, D) each.
        step: one, or (n,): names the trials.

    Proposals come from p. The expected trials given a rejection are 1 over the total variation of p and q, and so 1 for
    a test. Errors: `StudioError` after a million trials.
    """
    sampled, pending = p[0].clone(), torch.arange(len(p[0]), device=p[0].device)
    begun, count, trials = 0, 1, 0
    while len(pending):
        if begun >= _MOST_TRIALS:
            raise StudioError(
                "Draft and target agree up to rounding here: sample with the draft alone, or another seed."
            )
        mean, log_std = p[0][pending], p[1][pending]
        numbers = torch.arange(begun, begun + count, device=mean.device)[:, None]
        named = step[pending] if isinstance(step, torch.Tensor) else step
        normal, uniform = noise.trial(places.take(pending), numbers, named)
        proposals = mean + log_std.exp().to(mean.dtype) * normal
        ratio = log_density(proposals, q[0][pending], q[1][pending]) - log_density(proposals, mean, log_std)
        passed = uniform.double() <= -torch.expm1(ratio.clamp(max=0))
        found, first = passed.any(dim=0), passed.int().argmax(dim=0)
        sampled[pending[found]] = proposals[first[found], torch.nonzero(found)[:, 0]]
        trials += int(torch.where(found, first + 1, count).sum())
        pending = pending[~found]
        begun, count = begun + count, min(2 * count, max(1, _TRIALS_AT_ONCE // max(1, len(pending))))
    return sampled, trials


def _finish(target: ReverseTransitions, x, at, noise, temperature: float) -> torch.Tensor:
    """Tokens (n, D) from the states x (n, D) below the steps `at` (n,), which fall; noise (T, n, D)."""
    walking = x[:0]
    for step in reversed(range(int(at[0]))):
        begun = int((at > step).sum())
        walking = torch.cat((walking, x[len(walking) : begun]))
        mean, log_std = target.at(walking, step)
        walking = mean + temperature * log_std.exp() * noise[step, :begun] if step else mean
    return walking


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
        return ended

    def take(self, rows) -> "FinalStep":
        """Those of some of the paths."""
        return FinalStep(self.mean[rows], self.std[rows], self.widths[rows])


@dataclass
class Resampled:
    """Tokens (n, D) in place of rejected ones, rounds of trials, and which tokens (n,) no trial accepted."""

    tokens: torch.Tensor
    rounds: int
    fallbacks: torch.Tensor


def log_width_ratio(target: FinalStep, draft: FinalStep, reference: bool = False) -> torch.Tensor:
    """Log (n,), float64, of what the widths of the steps before the last make of the ratio of paths."""
    ratio = (draft.widths.double() - target.widths.double()).sum(dim=1)
    return -ratio if reference else ratio


def log_ratio(
    x: torch.Tensor, target: FinalStep, draft: FinalStep, inner_temperature: float, reference: bool = False
) -> torch.Tensor:
    """Log ratio (n,), float64; the draft x (n, D) is accepted if it exceeds the log of a uniform number."""
    ratio = log_width_ratio(target, draft, reference)
    for ends, sign in ((target, 1), (draft, -1)):
        std = ends.std.double()
        exponent = ((x.double() - ends.mean.double()) / (std * inner_temperature)).square() / 2
        ratio = ratio - sign * (exponent + std.log()).sum(dim=1)
    return ratio


def trial_chance(x: torch.Tensor, target: FinalStep, draft: FinalStep, reference: bool = False) -> torch.Tensor:
    """The chance (n,), float64, that a trial x (n, D), sampled from the target's last step, is accepted."""
    theirs, drafts = (log_density(x, ends.mean, ends.std.double().log()) for ends in (target, draft))
    excess = drafts - theirs - log_width_ratio(target, draft, reference)
    return -torch.expm1(excess.clamp(max=0))


def resample(
    target: FinalStep, draft: FinalStep, places: TokenIndex, noise: PositionNoise, max_rounds: int
) -> Resampled:
    """Samples for rejected tokens: trials from the target's last step, at most `max_rounds` for each."""
    tokens, pending, rounds = target.mean.clone(), torch.arange(len(target.mean), device=target.mean.device), 0
    fallbacks = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    while len(pending) and rounds < max_rounds:
        theirs, drafts = target.take(pending), draft.take(pending)
        normal, uniform = noise.trial(places.take(pending), rounds)
        trial = theirs.mean + theirs.std * normal
        passed = uniform < trial_chance(trial, theirs, drafts)
        tokens[pending[passed]] = trial[passed]
        pending, rounds = pending[~passed], rounds + 1
    normal, _ = noise.trial(places.take(pending), max_rounds)
    tokens[pending] = target.mean[pending] + target.std[pending] * normal
    fallbacks[pending] = True
    return Resampled(tokens, rounds, fallbacks)


def resample_reference(
    target: FinalStep, draft: FinalStep, places: TokenIndex, noise: PositionNoise, max_rounds: int
) -> Resampled:
    """As the authors do it, for all tokens of a block: rounds until each was accepted once; later ones count.

    That includes tokens whose draft was accepted, which are never replaced: of the fallbacks, those are none.
    """
    tokens, rounds = torch.zeros_like(target.mean), 0
    accepted = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    while not accepted.all() and rounds < max_rounds:
        normal, uniform = noise.trial(places, rounds)
        trial = target.mean + target.std * normal
        passed = uniform < trial_chance(trial, target, draft, reference=True)
        tokens[passed] = trial[passed]
        accepted, rounds = accepted | passed, rounds + 1
    return Resampled(tokens, rounds, ~accepted)


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
        reference: the authors' scheme to the letter, for their published numbers; "relaxed" only.
        draft_steps: steps that the draft runs ahead; 4 if None; "relaxed" only.
        inner_temperature: flattens the last step's densities in the test, above 0; 42 if None; "relaxed" only.
        max_rounds: trials for a rejected token, 1 to 10,000; 100 if None; "relaxed" only.

    Errors: `StudioError` for a value outside these, and for a setting of "relaxed" in "exact" mode.
    """

    mode: str = "exact"
    prefill: float = 0.05
    reference: bool = False
    draft_steps: int | None = None
    inner_temperature: float | None = None
    max_rounds: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("mode", self.mode, MODES)
        set_fields(self, prefill=check_number("prefill", self.prefill, 0, 1))
        set_fields(self, reference=check_flag("reference", self.reference))
        if self.mode == "exact":
            given = [name for name in _RELAXED if getattr(self, name) is not None]
            if given or self.reference:
                raise StudioError(f'{", ".join(given or ["reference"])} goes with mode="relaxed" only: leave it out.')
            return
        filled = {name: value if (value := getattr(self, name)) is not None else _RELAXED[name] for name in _RELAXED}
        set_fields(
            self,
            draft_steps=check_integer("draft_steps", filled["draft_steps"], 1),
            inner_temperature=check_number("inner_temperature", filled["inner_temperature"], above=True),
            max_rounds=check_integer("max_rounds", filled["max_rounds"], 1, MAX_ROUNDS),
        )

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
        if self.draft_steps > VALIDATED_DRAFT_STEPS:
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
        """BatchSpec of the drafts that were accepted."""
        return self.accepted / max(1, self.tested)


@torch.no_grad()
def continuous_speculative(
    model: torch.nn.Module,
    condition: dict,
    *,
    draft: torch.nn.Module,
    generators: list[torch.Generator] | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    settings: ContinuousSpeculative | None = None,
    on_call: Callable[[str, torch.Tensor, torch.Tensor], bool | None] | None = None,
    noise: PositionNoise | None = None,
) -> ContinuousOutput:
    """Samples all tokens of B images.

    Args:
        model: the target, a `MAR` in evaluation mode.
        condition, generators, guidance_scale, noise: as of `masked_autoregressive`, of both models.
        draft: a `MAR` over the same tokens.
        temperature: as of `masked_autoregressive`, above 0.
        on_call: called as (what, positions (B, k), tokens (B, L, D)) after the target drew tokens ("target"), the draft
            drew some ("draft"), and the target replaced those it rejected ("verify"); True stops the loop.

    Errors: `StudioError` for models over different tokens, more steps than tokens, fewer than two denoising steps, and
    a temperature of 0.
    """
    settings = (settings or ContinuousSpeculative()).filled()
    check_pair(model, draft, settings, temperature)
    noise = noise or PositionNoise.of(generators, model.config.token_dim, model.device)
    return _Run(model, draft, condition, noise, guidance_scale, temperature, settings, on_call).sample()


def check_pair(model, draft, settings: ContinuousSpeculative, temperature: float) -> None:
    """Raises the `StudioError` that `continuous_speculative` would raise for these, with settings that are filled."""
    check_number("temperature", temperature)
    if temperature == 0:
        raise StudioError("A temperature of 0 leaves nothing to verify: sample with MaskedAutoregressive instead.")
    if settings.diffusion_steps < 2:
        raise StudioError("A single denoising step leaves nothing to verify: take two diffusion_steps at least.")
    ours, theirs = ((m.num_tokens, m.config.token_dim, m.config.patch_size) for m in (model, draft))
    if ours != theirs:
        raise StudioError(
            f"Draft and target must sample the same tokens; the target has {ours[0]} of {ours[1]} numbers in patches of "
            f"{ours[2]}, the draft {theirs[0]} of {theirs[1]} in patches of {theirs[2]}."
        )


class _Run:
    """The images of one call: order, tokens, both models, and in "relaxed" the ends of drafts not yet verified."""

    def __init__(self, model, draft, condition, noise, guidance_scale, temperature, settings, on_call):
        self.settings, self.temperature, self.guidance_scale = settings, temperature, guidance_scale
        self.noise, self.on_call = noise, on_call
        self.plan = settings.plan(model.num_tokens)
        self.began = time.perf_counter()
        guided, steps = guidance_scale != 1, settings.diffusion_steps
        self.target, self.draft = (MARStepper(m, condition, guided, steps) for m in (model, draft))
        self.order = noise.order(model.num_tokens)
        shape = (*self.order.shape, model.config.token_dim)
        self.tokens = torch.zeros(shape, device=model.device)
        self.ends = FinalStep(*(torch.zeros(shape, device=model.device) for _ in range(3)))
        self.scales = torch.zeros(*self.order.shape, 1, device=model.device)
        self.verified = model.num_tokens
        self.drafting = 0.0
        from_draft = torch.zeros(self.order.shape, dtype=torch.bool, device=model.device)
        self.sampled = ContinuousOutput(self.tokens, from_draft=from_draft)

    def sample(self) -> ContinuousOutput:
        verify = {"exact": self._exact_step, "relaxed": self._relaxed_step}[self.settings.mode]
        for number, step in enumerate(self.plan):
            if number <= self.settings.steps * self.settings.prefill:
                stopped = self._target_step(step)
            else:
                stopped = verify(number, step)
            if stopped:
                break
        sampled, seconds = self.sampled, time.perf_counter() - self.began
        sampled.target_calls, sampled.row_calls = self.target.calls, self.target.rows
        sampled.draft_calls = self.draft.calls
        sampled.seconds = {"target": seconds - self.drafting, "draft": self.drafting}
        return sampled

    def _target_step(self, step: Step) -> bool:
        places, steps = self._descend(self.target, step)
        put(self.tokens, places, [mean for _, _, mean, _ in steps][-1])
        self.verified = step.first
        return self._told("target", step)

    def _exact_step(self, number: int, step: Step) -> bool:
        entered = time.perf_counter()
        kernels = self._kernels(self.draft, step)
        places = self._places(step)
        path = trace(kernels, self.noise.start(places), self._step_noise(places), self.temperature)
        put(self.tokens, places, path.means[0])
        self.drafting += time.perf_counter() - entered
        if self._told("draft", step):
            return True
        verdict = verify_path(path, self._kernels(self.target, step), places, self.noise, self.temperature)
        put(self.tokens, places, verdict.tokens)
        self._count(places, verdict.accepted)
        self.sampled.trials += verdict.trials
        return self._told("verify", step)

    def _relaxed_step(self, number: int, step: Step) -> bool:
        entered = time.perf_counter()
        places, steps = self._descend(self.draft, step)
        ends = FinalStep.of(steps, self.temperature)
        for kept, new in ((self.tokens, ends.mean), (self.ends.mean, ends.mean), (self.ends.std, ends.std),
                          (self.ends.widths, ends.widths)):  # fmt: skip
            put(kept, places, new)
        self.scales[places.images, places.positions] = self.settings.scale_at(step, self.guidance_scale)
        self.drafting += time.perf_counter() - entered
        stopped = self._told("draft", step)
        if stopped or (number % self.settings.draft_steps and number + 1 < len(self.plan)):
            return stopped
        return self._verify_block(Step(step.first, self.verified, step.progress))

    def _verify_block(self, block: Step) -> bool:
        """Tests all tokens that the draft drew since the last test, together."""
        reference = self.settings.reference
        places = self._places(block)
        scales = None if reference else self.scales[places.images, places.positions]
        _, steps = self._descend(self.target, block, scales)
        target = FinalStep.of(steps, self.temperature)
        at = (places.images, places.positions)
        draft = self.ends.take(at)
        ratio = log_ratio(self.tokens[at], target, draft, self.settings.inner_temperature, reference)
        accepted = ratio > self.noise.test(places).double().log()
        self._count(places, accepted)
        if not accepted.all():
            self._replace(places, target, draft, torch.nonzero(~accepted)[:, 0])
        self.verified = block.first
        return self._told("verify", block)

    def _replace(self, places: TokenIndex, target: FinalStep, draft: FinalStep, rejected: torch.Tensor) -> None:
        if self.settings.reference:
            resampled = resample_reference(target, draft, places, self.noise, self.settings.max_rounds)
            tokens, fallbacks = resampled.tokens[rejected], resampled.fallbacks[rejected]
        else:
            resampled = resample(
                target.take(rejected), draft.take(rejected), places.take(rejected), self.noise, self.settings.max_rounds
            )
            tokens, fallbacks = resampled.tokens, resampled.fallbacks
        put(self.tokens, places.take(rejected), tokens)
        self.sampled.trials += resampled.rounds
        self.sampled.fallbacks += int(fallbacks.sum())

    def _descend(self, painter: MARStepper, step: Step, scales: torch.Tensor | None = None):
        """TokenIndex of a step and the denoising steps of its tokens, lazily."""
        kernels, places = self._kernels(painter, step, scales), self._places(step)
        return places, denoise(kernels, self.noise.start(places), self._step_noise(places), self.temperature)

    def _kernels(self, painter: MARStepper, step: Step, scales: torch.Tensor | None = None):
        scale = self.settings.scale_at(step, self.guidance_scale) if scales is None else scales
        return painter.kernels(self.tokens, self.order, step, scale)

    def _step_noise(self, places: TokenIndex) -> torch.Tensor:
        return self.noise.steps(places, self.settings.diffusion_steps)

    def _places(self, step: Step) -> TokenIndex:
        return TokenIndex.of(self.order[:, step.first : step.last])

    def _count(self, places: TokenIndex, accepted: torch.Tensor) -> None:
        self.sampled.from_draft[places.images, places.positions] = accepted
        self.sampled.tested += len(accepted)
        self.sampled.accepted += int(accepted.sum())

    def _told(self, what: str, step: Step) -> bool:
        if self.on_call is None:
            return False
        return bool(self.on_call(what, self.order[:, step.first : step.last], self.tokens))
