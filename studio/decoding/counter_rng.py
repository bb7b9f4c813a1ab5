"""Gaussian and uniform numbers of every image, position and purpose, computed when they are asked for.

Each number is a hash of its image's key, its position, its purpose and its place in the token (the mixing function of
SplitMix64, Steele, Lea and Flood, 2014; Gaussians by Box and Muller, 1958), so that nothing is stored, the same number
can be asked for twice, and no image's numbers depend on the others in the batch.
"""

import math
from typing import NamedTuple

import torch

_GOLDEN, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LOW = 2**32 - 1
_ORDER, _START, _STEP, _TEST, _TRIAL, _TRIAL_TEST = range(1, 7)

Number = int | torch.Tensor


class TokenIndex(NamedTuple):
    """Positions (n,) of images (n,), int64: the rows that are sampled together."""

    images: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, positions: torch.Tensor) -> "TokenIndex":
        """Those of positions (B, k), image after image."""
        images = torch.arange(len(positions), device=positions.device)
        return cls(images.repeat_interleave(positions.shape[1]), positions.flatten())

    def take(self, rows: torch.Tensor) -> "TokenIndex":
        """Those of some rows."""
        return TokenIndex(self.images[rows], self.positions[rows])


class PositionNoise:
    """The random numbers of B images.

    Args:
        keys: (B,) int64, a random number for each image.
        token_dim: numbers of a token D.
    """

    def __init__(self, keys: torch.Tensor, token_dim: int) -> None:
        self.keys, self.token_dim = _mix(keys + _GOLDEN), token_dim

    @classmethod
    def of(cls, generators: list[torch.Generator], token_dim: int, device: torch.device | str) -> "PositionNoise":
        """One random number is taken from each image's generator."""
        sampled = [torch.randint(2**62, (1,), generator=g, device=g.device).to(device) for g in generators]
        return cls(torch.cat(sampled), token_dim)

    def order(self, total: int) -> torch.Tensor:
        """A random order (B, total) of the positions of each image."""
        positions = torch.arange(total, device=self.keys.device).expand(len(self.keys), -1)
        return self._state(TokenIndex.of(positions), _ORDER).view(-1, total).argsort(dim=1)

    def start(self, places: TokenIndex) -> torch.Tensor:
        """Gaussian x_T (n, D)."""
        return self._normal(self._state(places, _START))

    def steps(self, places: TokenIndex, count: int) -> torch.Tensor:
        """Gaussian noise (count, n, D) of denoising steps 0 to count - 1; that of step 0 is never used."""
        steps = torch.arange(count, device=self.keys.device)[:, None]
        return self._normal(self._state(places, _STEP, steps))

    def test(self, places: TokenIndex, step: Number = 0) -> torch.Tensor:
        """Uniform numbers that decide on acceptance, (n,); (t, n) for steps (t, 1)."""
        return _uniform(self._state(places, _TEST, step))

    def trial(self, places: TokenIndex, number: Number, step: Number = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Gaussian (n, D) and uniform (n,) of the number-th proposal after a rejection at a step, one or (n,)."""
        return (
            self._normal(self._state(places, _TRIAL, number, step)),
            _uniform(self._state(places, _TRIAL_TEST, number, step)),
        )

    def _state(self, places: TokenIndex, *purpose: Number) -> torch.Tensor:
        state = _mix(self.keys[places.images] + places.positions)
        for number in purpose:
            state = _mix(state + _GOLDEN + number)
        return state

    def _normal(self, state: torch.Tensor) -> torch.Tensor:
        bits = _mix(state[..., None] + torch.arange(1, self.token_dim + 1, device=state.device))
        return (-2 * _uniform(bits).log()).sqrt() * torch.cos(2 * math.pi * _uniform(bits >> 32))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A one-to-one scrambling of 64-bit numbers."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """Numbers above 0, at most 1, float32, of the low 32 bits."""
    return ((bits & _LOW).float() + 0.5) * 2.0**-32
