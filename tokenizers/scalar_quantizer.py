"""Quantisation of single numbers on levels that are dense where a Gaussian is, without anything to learn.

TokenBridge (arXiv:2503.16430, section 3.2): the line is cut where a standard Gaussian has equal shares, and each part
is stood for by the mean that the Gaussian has within it. A number takes the nearest level, as in the authors' code; the
cuts only say where the levels are.

Deviations from that code: the nearest level is found among the middles between levels, not by its distance to each of
them; levels are computed in float64 (theirs, in float32, differ by up to 5.5e-6, so a checkpoint's own are used where
it has them).
"""

from collections.abc import Sequence

import torch

from studio.errors import StudioError


def normal_levels(levels: int, std_range: float) -> list[float]:
    """Means of a standard Gaussian within each of `levels` equal shares of it, cut off at +-`std_range`."""
    shares = torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels
    edges = torch.special.ndtri(shares).clamp(-std_range, std_range)
    density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
    return (-density.diff() / torch.special.ndtr(edges).diff()).float().tolist()


class ScalarQuantizer:
    """Numbers to levels and back, in float32 whatever comes in.

    Args:
        positions: place of each level on the axis from -`std_range` to `std_range`, growing.
        value_range: the numbers at the two ends of that axis; those outside take the outermost levels.
        std_range: half the length of the axis.

    Errors: `StudioError` for fewer than two levels, levels out of order, and an empty range.
    """

    def __init__(self, positions: Sequence[float], value_range: tuple[float, float], std_range: float):
        self.low, self.high = value_range
        self.std_range = std_range
        if not self.low < self.high or std_range <= 0:
            raise StudioError(f"Numbers need a range from low to high, not {value_range!r} and {std_range!r}.")
        self._positions = torch.tensor(positions, dtype=torch.float32, device="cpu")
        if len(positions) < 2 or not (self._positions.diff() > 0).all():
            raise StudioError("A quantiser needs two levels at least, each above the one before it.")

    def __len__(self) -> int:
        return len(self._positions)

    def values(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The number that each level stands for, (levels,)."""
        return self._unplace(self._on(device))

    def place(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of any shape on the axis of the levels, the outer ones moved to its ends."""
        spread = 2 * self.std_range
        shares = (numbers.float() - self.low) / (self.high - self.low)
        return (shares * spread - self.std_range).clamp(-self.std_range, self.std_range)

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """The nearest level of each number, int64, of two as near the lower."""
        positions = self._on(numbers.device)
        return torch.bucketize(self.place(numbers).contiguous(), (positions[:-1] + positions[1:]) / 2)

    def decode(self, levels: torch.Tensor) -> torch.Tensor:
        """The numbers of levels of any shape."""
        return self._unplace(self._on(levels.device)[levels])

    def _unplace(self, positions: torch.Tensor) -> torch.Tensor:
        shares = (positions + self.std_range) / (2 * self.std_range)
        return shares * (self.high - self.low) + self.low

    def _on(self, device: torch.device | str) -> torch.Tensor:
        self._positions = self._positions.to(device)
        return self._positions
