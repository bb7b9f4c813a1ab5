"""Fourier head: an output layer whose distribution over ordered bins is smooth.

"Fourier Head: Helping Large Language Models Learn Complex Probability Distributions" (arXiv:2410.22269), section 3. A
state becomes complex numbers a_0 to a_N. Their autocorrelation gives a density on [-1, 1] that is never negative and
has the integral 1; bin j of m has its value at the centre -1 + (2j + 1)/m. A softmax over the outputs gives these
probabilities, up to a floor of 1e-5.

Deviations from the authors' code: the density is computed as `|sum_n a_n exp(i pi n z)|^2 / (2 c_0)`, which equals
their sum over autocorrelations and is one product; the regulariser takes c_k/c_0, because theirs grows with the scale
of a, which the distribution does not depend on.
"""

import math

import torch
from torch import nn

from studio.errors import StudioError

FLOOR = 1e-5
GAMMA = 1e-6
"""Weight of the regulariser."""
INITIAL_SCALE = 100.0
"""What the first weights are divided by."""


class FourierHead(nn.Linear):
    """A layer in place of a linear one over `bins` ordered classes.

    Args:
        in_features: length of a state.
        bins: classes m. The first and the last are neighbours, as the series is periodic.
        frequencies: N, from 1 to m - 1.

    Raises:
        StudioError: as many frequencies as bins, or more: the bins would not sum to one.
    """

    def __init__(self, in_features: int, bins: int, frequencies: int):
        if not 1 <= frequencies < bins:
            raise StudioError(f"A Fourier head over {bins} bins has 1 to {bins - 1} frequencies, not {frequencies}.")
        super().__init__(in_features, 2 * (frequencies + 1))
        self.bins, self.frequencies = bins, frequencies

    def reset_parameters(self) -> None:
        """The weights of a new layer."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight.div_(INITIAL_SCALE)
            self.bias.div_(INITIAL_SCALE)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (..., bins) of states (..., in_features), float32."""
        real, imaginary = self.coefficients(states)
        centres = torch.arange(self.bins, device=states.device, dtype=torch.float32)
        angles = math.pi * torch.arange(self.frequencies + 1, device=states.device)[:, None] * (
            (2 * centres + 1) / self.bins - 1
        )  # fmt: skip
        cosines, sines = angles.cos(), angles.sin()
        power = (real @ cosines - imaginary @ sines).square() + (real @ sines + imaginary @ cosines).square()
        return torch.log(power / power.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny) + FLOOR)

    def coefficients(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Real and imaginary parts (..., N + 1), float32, of the numbers a."""
        real, imaginary = super().forward(states).float().chunk(2, dim=-1)
        return real, imaginary

    def roughness(self, states: torch.Tensor) -> torch.Tensor:
        """The regulariser (scalar): `4 pi^2` times the mean over states of `sum_k k^2 |c_k / c_0|^2`."""
        a = torch.complex(*self.coefficients(states))
        count = self.frequencies + 1
        c = torch.stack([(a[..., k:] * a[..., : count - k].conj()).sum(dim=-1) for k in range(count)], dim=-1)
        shares = (c[..., 1:].abs() / c[..., :1].abs().clamp_min(torch.finfo(torch.float32).tiny)).square()
        weights = torch.arange(1, count, device=a.device).square()
        return 4 * math.pi**2 * (weights * shares).sum(dim=-1).mean()
