"""Exact speculative sampling of denoising paths: a draft's path is tested step by step, and corrected where it fails.

Speculative sampling (arXiv:2211.17192, algorithm 1) applied to the chain of Gaussian reverse transitions of a diffusion
model, as "Accelerated Diffusion Models via Speculative Sampling" (arXiv:2501.05370) does within one image. The target's
transitions at all states of the draft's path come from one call. From the first step down, the outcome x of a step
passes with probability min(1, p(x) / q(x)); the first that fails is sampled anew from the residual max(0, p - q),
normalised, and the target walks the steps below. Step 0 has no noise: its mean under the target, never the draft's, is
the token. So tokens follow the target's distribution, whatever the draft.
"""

from typing import NamedTuple

import torch

from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.denoising import ReverseTransitions, denoise
from studio.errors import StudioError

_TRIALS_AT_ONCE = 4096
_MOST_TRIALS = 2**20

Gaussian = tuple[torch.Tensor, torch.Tensor]
"""Mean and log of the standard deviation, (n, D) each."""


class Path(NamedTuple):
    """How n tokens were denoised, by step: the states (T, n, D) that steps 0 to T - 1 began from, the means of the
    draft's kernels there and the logs of their standard deviations, without temperature.
    """

    states: torch.Tensor
    means: torch.Tensor
    log_stds: torch.Tensor


class VerifiedPath(NamedTuple):
    """Tokens (n, D) of the target's distribution, which of them (n,) kept the draft's whole path, and trials for the
    others.
    """

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
) -> VerifiedPath:
    """Tokens of the target's distribution from a draft's path.

    Args:
        path: sampled with `noise.start(places)`, `noise.steps(places, T)` and this temperature.
        target: kernels of the same tokens.
        noise: of the tests, too. Below a failed step the noise of the steps is used again, which no test has seen.
        temperature: above 0.

    Raises:
        StudioError: when a residual is too small to be sampled from, which rounding alone can bring about.
    """
    scaling = torch.tensor(temperature, dtype=torch.float64).log()
    means, log_stds = target.along(path.states, 0)
    total = len(path.states)
    if total == 1:
        return VerifiedPath(means[0], torch.ones(len(means[0]), dtype=torch.bool, device=means.device), 0)
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
        x, trials = sample_residual(p, q, mended, noise, at)
        tokens[rows] = _finish(target.take(rows), x, at, noise.steps(mended, total), temperature)
    return VerifiedPath(tokens, accepted, trials)


def sample_residual(
    p: Gaussian, q: Gaussian, places: TokenIndex, noise: PositionNoise, step: int | torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Samples (n, D) from max(0, p - q), normalised, and the number of trials they took.

    Args:
        p, q: Gaussians (mean, log of the standard deviation), (n, D) each.
        step: one, or (n,): names the trials.

    Proposals come from p. The expected trials given a rejection are 1 over the total variation of p and q, and so 1 for
    a test.

    Raises:
        StudioError: after a million trials.
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


def _finish(
    target: ReverseTransitions, x: torch.Tensor, at: torch.Tensor, noise: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Tokens (n, D) from the states x (n, D) below the steps `at` (n,), which fall; noise (T, n, D)."""
    walking = x[:0]
    for step in reversed(range(int(at[0]))):
        begun = int((at > step).sum())
        walking = torch.cat((walking, x[len(walking) : begun]))
        mean, log_std = target.at(walking, step)
        walking = mean + temperature * log_std.exp() * noise[step, :begun] if step else mean
    return walking
