"""The diffusion-loss head: a small network that draws one continuous token from a condition vector by denoising.

"Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838), section 3 and appendix; blocks with
adaptive layer norm as in DiT (arXiv:2212.09748). Parameters carry the authors' names.

What depends on the condition and the time is apart from what depends on the state, so that decoding can prepare the
former for many steps at once. Scope: the network and its training loss; denoising is the business of `studio.decoding`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from studio.models.gaussian_diffusion import GaussianDiffusion

_FREQUENCIES = 128
_EPS = 1e-6


def time_waves(times: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of times (N,) at 128 frequencies each: (N, 256), float32."""
    steps = torch.arange(_FREQUENCIES, dtype=torch.float32, device=times.device)
    angles = times[:, None].float() * torch.exp(-math.log(10000) * steps / _FREQUENCIES)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    """Times (N,) in steps of training to vectors (N, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        return self.mlp(time_waves(times).to(self.mlp[0].weight.dtype))


class Modulation(nn.Sequential):
    """SiLU and the linear layer that makes shifts, scales, which are 1 more than it says, and gates."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    def of_activated(self, activated: torch.Tensor) -> torch.Tensor:
        """All parts (..., parts * width) for what the SiLU returns (..., width)."""
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

    def forward(self, hidden, modulated):
        shift, scale, gate = modulated.chunk(3, dim=-1)
        return torch.addcmul(hidden, gate, self.mlp(torch.addcmul(shift, self.in_ln(hidden), scale)))


class FinalLayer(nn.Module):
    """Norm without weights, shift and scale, one linear layer."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, hidden, modulated):
        shift, scale = modulated.chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(hidden), scale))


class DenoisingNetwork(nn.Module):
    """Noisy tokens, times and conditions to predicted noise and variance logits.

    Args:
        token_dim: numbers of a token D.
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
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(m.adaLN_modulation[1] for m in (*self.res_blocks, self.final_layer)), self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def modulations(self, embedded: torch.Tensor) -> list[torch.Tensor]:
        """What the blocks and the final layer read of `time_embed(times) + cond_embed(conditions)` (..., width)."""
        activated = F.silu(embedded)
        return [layer.adaLN_modulation.of_activated(activated) for layer in (*self.res_blocks, self.final_layer)]

    def denoise(self, x: torch.Tensor, modulated: list[torch.Tensor]) -> torch.Tensor:
        """Noise and variance logits (..., 2D) for x (..., D); axes of x and of the modulations broadcast."""
        hidden = self.input_proj(x)
        for block, part in zip(self.res_blocks, modulated):
            hidden = block(hidden, part)
        return self.final_layer(hidden, modulated[-1])

    def for_decoding(self):
        """The view whose reverse steps are single calls of C (`studio.models.native_head`), or None."""
        from studio.models.views import head_view

        return head_view(self)

    def forward(self, x: torch.Tensor, times: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """Noise and variance logits (N, 2D) for x (N, D), times (N,) of training and conditions (N, condition_dim)."""
        return self.denoise(x, self.modulations(self.time_embed(times) + self.cond_embed(conditions)))


class DiffusionLoss(nn.Module):
    """The head of MAR: `net`, and the loss that trains it.

    Args: as of `DenoisingNetwork`, and `limit`, as of `GaussianDiffusion`.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.net = DenoisingNetwork(token_dim, condition_dim, width, depth)
        self._schedules: dict[int, GaussianDiffusion] = {}

    def schedule(self, steps: int = 1000) -> GaussianDiffusion:
        """The diffusion that the head learned, 1000 steps, respaced to `steps`."""
        if steps not in self._schedules:
            self._schedules[steps] = GaussianDiffusion(steps, limit=self.limit)
        return self._schedules[steps]

    def forward(
        self,
        tokens: torch.Tensor,
        conditions: torch.Tensor,
        *,
        times: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss (N,) of tokens (N, D) under conditions (N, condition_dim): squared error plus bound in bits.

        `times` (N,) int64, 0 to 999, and `noise` (N, D) come from the global generator when they are not given.
        """
        diffusion = self.schedule()
        if times is None:
            times = torch.randint(diffusion.steps, (len(tokens),), device=tokens.device)
        if noise is None:
            noise = torch.randn_like(tokens)
        output = self.net(diffusion.diffuse(tokens, times, noise), times, conditions)
        error, bound = diffusion.losses(tokens, times, noise, output.float())
        return error + bound
