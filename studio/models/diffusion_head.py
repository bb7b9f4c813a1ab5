"""The diffusion-loss head: a small network that samples one continuous token from a condition vector by denoising.

"Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838), section 3 and appendix; blocks with
adaptive layer norm as in DiT (arXiv:2212.09748). Parameters carry the authors' names. The modulations, which depend on
condition and time, are computed apart from what depends on the state, so decoding prepares them for many steps at once.

`GaussianDiffusion` has the cosine schedule, respaced to few steps, with learned variances ("Improved Denoising
Diffusion Probabilistic Models", arXiv:2102.09672): the schedule is equation 17, the learned variance equation 15, the
loss equation 16; reverse steps are those of DDPM (arXiv:2006.11239, equations 6 and 7).

Scope: the network, the schedule and the training loss. `studio.decoding.denoising` denoises.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from studio.checks import check_integer, shown
from studio.errors import StudioError

_PIXEL = 1 / 255


def cosine_betas(train_steps: int, max_beta: float) -> torch.Tensor:
    """Variances (train_steps,), float64, of the noise added by each step; none is above `max_beta`."""

    def kept(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [kept((step + 1) / train_steps) / kept(step / train_steps) for step in range(train_steps)]
    return torch.tensor([min(1 - ratio, max_beta) for ratio in ratios], dtype=torch.float64)


def respaced_times(steps: int, train_steps: int) -> list[int]:
    """The `steps` training times that are kept, evenly spaced from 0 to train_steps - 1; halves round to even."""
    stride = (train_steps - 1) / (steps - 1) if steps > 1 else 1.0
    times, at = [], 0.0
    for _ in range(steps):
        times.append(round(at))
        at += stride
    return times


class GaussianDiffusion:
    """A diffusion of `train_steps` steps, respaced to `steps`: tables (steps,), float64, and formulas that use them.

    Args:
        steps: denoising steps T, 1 to train_steps.
        train_steps: steps of the schedule that the network was trained with.
        max_beta: the largest variance of a step.
        latest_time: if given, training times after it become this one, and the schedule has fewer steps where several
            do ("DiSA", arXiv:2505.20297, the authors' code).
        limit: if given, above 0, reverse steps clamp the predicted data to +-`limit` (static thresholding,
            arXiv:2205.11487, section 2.3). At the noisiest steps the predicted data are a large multiple of a small
            difference, so errors of a small network would move states far away.

    Attributes:
        timestep_map: (T,) int64, the network's time at each step.
        betas, alphas_cumprod, alphas_cumprod_prev, posterior_variance, posterior_log_variance_clipped,
            posterior_mean_coef1, posterior_mean_coef2, sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod: tables
            named as in the authors' code.

    Raises:
        StudioError: a number of steps out of range, or a limit that is not above 0.
    """

    def __init__(
        self,
        steps: int,
        train_steps: int = 1000,
        max_beta: float = 0.999,
        limit: float | None = None,
        latest_time: int | None = None,
    ):
        steps = check_integer("The number of denoising steps", steps, 1, train_steps)
        if limit is not None and not limit > 0:
            raise StudioError(f"The limit of the data must be above 0, not {shown(limit)}.")
        times = respaced_times(steps, train_steps)
        if latest_time is not None:
            times = sorted({min(time, latest_time) for time in times})
        steps = len(times)
        self.steps, self.limit = steps, limit
        self.timestep_map = torch.tensor(times)
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
        """The coefficients of `reverse`, float32, (steps, 6).

        With a limit the first four are those of state and noise in the predicted data, and of data and state in the
        mean; without one, those of state and noise in the mean, and two zeros. The last two are the middle and half the
        range of the log of the standard deviation.
        """
        aim = torch.cat((self._reverse[:2], torch.zeros_like(self._reverse[:2]))) if self.limit is None else self._aim
        return torch.cat((aim, self._reverse[2:])).T.float().contiguous()

    def reverse(
        self, x: torch.Tensor, noise: torch.Tensor, logit: torch.Tensor, step: int | slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of the next, less noisy state, each shaped like x.

        Args:
            x: states (..., D) at this step.
            noise, logit: predicted noise and variance logit, like x.
            step: one step from 0 to T - 1; or a slice or indices of steps, one for each entry of x's first axis.
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

    def _mean_within(self, x: torch.Tensor, noise: torch.Tensor, tables: Iterable) -> torch.Tensor:
        grow, remove, to_data, stay = tables
        data = grow * x - remove * noise
        if self.limit is not None:
            data = data.clamp(-self.limit, self.limit)
        return to_data * data + stay * x

    @staticmethod
    def _of_steps(table: torch.Tensor, steps: slice | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return table[:, steps].to(x).reshape(4, -1, *[1] * (x.ndim - 1))

    def diffuse(self, x: torch.Tensor, step: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Adds noise (N, D) to data x (N, D) as of `step` (N,), 0 to T - 1."""
        kept = self.alphas_cumprod[step.cpu()].to(x)[:, None]
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def losses(
        self, x: torch.Tensor, step: torch.Tensor, noise: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two losses (N,): the mean squared error of the noise, and the variational bound in bits per dimension.

        Args:
            x: data (N, D).
            step: (N,) int64, 0 to T - 1.
            noise: (N, D), the noise of `diffuse(x, step, noise)`.
            output: the network's output (N, 2D) for it; the bound trains only the second half, the variance logits.
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

    def _posterior(self, x: torch.Tensor, noised: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second, log_variance = (
            table[at].to(x)[:, None]
            for table in (self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_log_variance_clipped)
        )
        return first * x + second * noised, log_variance / 2


def _log_likelihood_of_pixels(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log probability of the bin of width 2/255 around x under a Gaussian, by the tanh approximation of its CDF."""

    def below(at: torch.Tensor) -> torch.Tensor:
        scaled = (at - mean) * (-log_std).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (scaled + 0.044715 * scaled**3)))

    upper, lower = below(x + _PIXEL), below(x - _PIXEL)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()


_FREQUENCIES = 128
_EPS = 1e-6


def time_waves(times: torch.Tensor) -> torch.Tensor:
    """Sinusoidal embedding of times (N,): cosines, then sines, at 128 frequencies: (N, 256), float32."""
    steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device=times.device)
    angles = times[:, None].float() * torch.exp(-math.log(10000) * steps / _FREQUENCIES)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    """Embeds training times (N,) as vectors (N, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        return self.mlp(time_waves(times).to(next(self.parameters()).dtype))


class Modulation(nn.Sequential):
    """SiLU and a linear layer to shifts, scales (1 is added to them) and gates."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    def of_activated(self, activated: torch.Tensor) -> torch.Tensor:
        """All parts (..., parts * width) from the output of the SiLU (..., width)."""
        parts, width = self[1](activated), activated.shape[-1]
        parts[..., width : 2 * width] += 1
        return parts


class ResidualBlock(nn.Module):
    """Norm, shift and scale, two linear layers, gate, residual."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, hidden: torch.Tensor, modulated: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = modulated.chunk(3, dim=-1)
        return torch.addcmul(hidden, gate, self.mlp(torch.addcmul(shift, self.in_ln(hidden), scale)))


class FinalLayer(nn.Module):
    """Norm without weights, shift and scale, linear layer."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, hidden: torch.Tensor, modulated: torch.Tensor) -> torch.Tensor:
        shift, scale = modulated.chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(hidden), scale))


class DenoisingNetwork(nn.Module):
    """Predicts noise and variance logits from noisy tokens, times and conditions.

    Args:
        token_dim: dimensions D of a token.
        condition_dim: width of a condition.
        width, depth: width and number of the residual blocks.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
        self.apply(self._init_linear)
        for layer in self.time_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(m.adaLN_modulation[1] for m in (*self.res_blocks, self.final_layer)), self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def modulations(self, embedded: torch.Tensor) -> list[torch.Tensor]:
        """Modulations of all layers, from `time_embed(times) + cond_embed(conditions)` (..., width)."""
        activated = F.silu(embedded)
        return [layer.adaLN_modulation.of_activated(activated) for layer in (*self.res_blocks, self.final_layer)]

    def denoise(self, x: torch.Tensor, modulated: list[torch.Tensor]) -> torch.Tensor:
        """Noise and variance logits (..., 2D) for x (..., D); x and the modulations broadcast."""
        hidden = self.input_proj(x)
        for block, part in zip(self.res_blocks, modulated):
            hidden = block(hidden, part)
        return self.final_layer(hidden, modulated[-1])

    def forward(self, x: torch.Tensor, times: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """Noise and variance logits (N, 2D) for x (N, D), times (N,) of training and conditions (N, condition_dim)."""
        return self.denoise(x, self.modulations(self.time_embed(times) + self.cond_embed(conditions)))


class DiffusionLoss(nn.Module):
    """The head of MAR: `net`, and its training loss.

    Args:
        token_dim, condition_dim, width, depth: as of `DenoisingNetwork`.
        limit: as of `GaussianDiffusion`.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.net = DenoisingNetwork(token_dim, condition_dim, width, depth)
        self._schedules: dict[tuple[int, int | None], GaussianDiffusion] = {}

    def schedule(self, steps: int = 1000, latest_time: int | None = None) -> GaussianDiffusion:
        """The diffusion of the head's training, respaced to `steps`; arguments as of `GaussianDiffusion`."""
        key = steps, latest_time
        if key not in self._schedules:
            self._schedules[key] = GaussianDiffusion(steps, limit=self.limit, latest_time=latest_time)
        return self._schedules[key]

    def forward(
        self,
        tokens: torch.Tensor,
        conditions: torch.Tensor,
        *,
        times: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss (N,): squared error of the noise plus the variational bound in bits.

        Args:
            tokens: (N, D).
            conditions: (N, condition_dim).
            times: (N,) int64, 0 to 999; sampled from the global generator when None.
            noise: (N, D); sampled from the global generator when None.
        """
        diffusion = self.schedule()
        if times is None:
            times = torch.randint(diffusion.steps, (len(tokens),), device=tokens.device)
        if noise is None:
            noise = torch.randn_like(tokens)
        output = self.net(diffusion.diffuse(tokens, times, noise), times, conditions)
        error, bound = diffusion.losses(tokens, times, noise, output.float())
        return error + bound
