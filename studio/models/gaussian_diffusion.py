"""Gaussian diffusion with the cosine schedule, respaced to few steps, with learned variances.

"Improved Denoising Diffusion Probabilistic Models" (arXiv:2102.09672): the schedule is equation 17, the learned
variance equation 15, the loss equation 16; reverse steps are those of DDPM (arXiv:2006.11239, equations 6 and 7).
Scope: tables and formulas, as MAR (arXiv:2406.11838) uses them; which network is asked, and when, is not known here.
"""

import math

import torch

from studio.checks import check_integer
from studio.errors import StudioError

_PIXEL = 1 / 255


def cosine_betas(train_steps: int, max_beta: float) -> torch.Tensor:
    """Variances (train_steps,), float64, of the noise that each step adds."""

    def kept(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [kept((step + 1) / train_steps) / kept(step / train_steps) for step in range(train_steps)]
    return torch.tensor([min(1 - ratio, max_beta) for ratio in ratios], dtype=torch.float64)


def respaced_times(steps: int, train_steps: int) -> list[int]:
    """The original times that are kept, spread evenly from 0 to train_steps - 1; halves are rounded to even."""
    stride = (train_steps - 1) / (steps - 1) if steps > 1 else 1.0
    times, at = [], 0.0
    for _ in range(steps):
        times.append(round(at))
        at += stride
    return times


class GaussianDiffusion:
    """Tables (steps,), float64, of a diffusion of `train_steps` steps respaced to `steps`, and what is read from them.

    Args:
        steps: denoising steps T, 1 to train_steps.
        train_steps: steps of the schedule that the network learned.
        max_beta: the largest variance of a step.
        limit: if given, reverse steps aim at data within +-`limit` only, above 0 (static thresholding,
            arXiv:2205.11487, section 2.3). At the noisiest steps the data are a huge multiple of a small difference, so
            that what a small network gets wrong there would carry states far away.

    Attributes, named as in the authors' code: `timestep_map` (T,) int64, the network's time at each step; `betas`,
    `alphas_cumprod`, `alphas_cumprod_prev`, `posterior_variance`, `posterior_log_variance_clipped`,
    `posterior_mean_coef1`, `posterior_mean_coef2`, `sqrt_recip_alphas_cumprod`, `sqrt_recipm1_alphas_cumprod`.

    Errors: `StudioError` for a number of steps out of range, and for a limit that is not above 0.
    """

    def __init__(self, steps: int, train_steps: int = 1000, max_beta: float = 0.999, limit: float | None = None):
        steps = check_integer("The number of denoising steps", steps, 1, train_steps)
        if limit is not None and not limit > 0:
            raise StudioError(f"The limit of the data must be above 0, not {limit!r}.")
        self.steps, self.limit = steps, limit
        self.timestep_map = torch.tensor(respaced_times(steps, train_steps))
        kept = torch.cumprod(1 - cosine_betas(train_steps, max_beta), dim=0)[self.timestep_map]
        self.betas = betas = 1 - kept / torch.cat((kept.new_ones(1), kept[:-1]))
        self.alphas_cumprod = after = torch.cumprod(1 - betas, dim=0)
        self.alphas_cumprod_prev = before = torch.cat((after.new_ones(1), after[:-1]))
        self.posterior_variance = betas * (1 - before) / (1 - after)
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if steps > 1 else betas[0]
        self.posterior_log_variance_clipped = variance.log()
        self.posterior_mean_coef1 = betas * before.sqrt() / (1 - after)
        self.posterior_mean_coef2 = (1 - before) * (1 - betas).sqrt() / (1 - after)
        self.sqrt_recip_alphas_cumprod = after.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / after - 1).sqrt()
        self._reverse = torch.stack(
            (
                self.posterior_mean_coef1 * self.sqrt_recip_alphas_cumprod + self.posterior_mean_coef2,
                self.posterior_mean_coef1 * self.sqrt_recipm1_alphas_cumprod,
                (self.posterior_log_variance_clipped + betas.log()) / 4,
                (betas.log() - self.posterior_log_variance_clipped) / 4,
            )
        )
        self._reverse_rows = self._reverse.T.tolist()
        self._aim = torch.stack(
            (
                self.sqrt_recip_alphas_cumprod,
                self.sqrt_recipm1_alphas_cumprod,
                self.posterior_mean_coef1,
                self.posterior_mean_coef2,
            )
        )

    def table(self) -> torch.Tensor:
        """What `reverse` reads, a row (6,) a step, float32: with a limit what the state grows by, how much of the noise
        is removed, and the shares of the data aimed at and of the state; without one, how much of state and noise is
        kept and removed, and zeros; then the middle and half of the range of the log of the standard deviation.
        """
        aim = torch.cat((self._reverse[:2], torch.zeros_like(self._reverse[:2]))) if self.limit is None else self._aim
        return torch.cat((aim, self._reverse[2:])).T.float().contiguous()

    def reverse(
        self, x: torch.Tensor, noise: torch.Tensor, logit: torch.Tensor, step: int | slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log of the standard deviation, like x, of the state before `x`.

        Args:
            x: states (..., D) at this step.
            noise, logit: predicted noise and variance logit, like x.
            step: one step from 0 to T - 1; or a slice or indices of steps, of which x has one for each entry of its
                first axis.
        """
        if isinstance(step, int):
            keep, remove, middle, half = self._reverse_rows[step]
            log_std = logit * half + middle
            if self.limit is not None:
                return self._mean_within(x, noise, self._aim[:, step].tolist()), log_std
            return torch.add(x * keep, noise, alpha=-remove), log_std
        keep, remove, middle, half = self._of_steps(self._reverse, step, x)
        log_std = middle + half * logit
        if self.limit is not None:
            return self._mean_within(x, noise, self._of_steps(self._aim, step, x)), log_std
        return keep * x - remove * noise, log_std

    def _mean_within(self, x, noise, tables):
        grow, remove, to_data, stay = tables
        return to_data * (grow * x - remove * noise).clamp(-self.limit, self.limit) + stay * x

    @staticmethod
    def _of_steps(table, steps, x):
        return table[:, steps].to(x).reshape(4, -1, *[1] * (x.ndim - 1))

    def diffuse(self, x: torch.Tensor, step: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Data x (N, D) with noise as of `step` (N,)."""
        kept = self.alphas_cumprod[step.cpu()].to(x)[:, None]
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def losses(
        self, x: torch.Tensor, step: torch.Tensor, noise: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two losses (N,): the mean squared error of the noise, and the variational bound in bits a number.

        Args:
            x: data (N, D).
            step: (N,) int64, 0 to T - 1.
            noise: (N, D), which made `diffuse(x, step, noise)`.
            output: what the network says to that, (N, 2D); the bound teaches only its second half, the logits.
        """
        predicted, logit = output.chunk(2, dim=-1)
        at = step.cpu()
        noised = self.diffuse(x, step, noise)
        mean, log_std = self.reverse(noised, predicted.detach(), logit, at)
        true_mean, true_log_std = self._posterior(x, noised, at)
        apart = ((true_mean - mean) * (-log_std).exp()).square()
        widths = 2 * (true_log_std - log_std)
        divergence = 0.5 * (widths.exp() - 1 - widths + apart)
        likelihood = _log_likelihood_of_pixels(x, mean, log_std)
        bound = torch.where(step[:, None] == 0, -likelihood, divergence).mean(dim=1) / math.log(2)
        return (noise - predicted).square().mean(dim=1), bound

    def _posterior(self, x, noised, at):
        first, second, log_variance = (
            table[at].to(x)[:, None]
            for table in (self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_log_variance_clipped)
        )
        return first * x + second * noised, log_variance / 2


def _log_likelihood_of_pixels(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log probability of the bin of width 2/255 around x under a Gaussian, by the tanh form of its distribution."""

    def below(at):
        scaled = (at - mean) * (-log_std).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scaled + 0.044715 * scaled**3)))

    upper, lower = below(x + _PIXEL), below(x - _PIXEL)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()
