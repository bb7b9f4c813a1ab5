"""Scalar quantisation on levels spaced for a Gaussian, without learned parameters.

TokenBridge (arXiv:2503.16430, section 3.2): the real line is cut into intervals of equal probability under a standard
Gaussian, and the level of an interval is the Gaussian's mean within it. A number takes the nearest level, as in the
authors' code.

Deviations from that code: the nearest level is found by bisection of the midpoints, not by all distances; levels are
computed in float64 (theirs, in float32, differ by up to 5.5e-6, so a checkpoint's own levels are used where it has
them).
"""

from collections.abc import Sequence

import torch

from studio.checks import shown
from studio.errors import StudioError


def normal_levels(levels: int, std_range: float) -> list[float]:
    """Means of a standard Gaussian within `levels` intervals of equal probability, truncated at +-`std_range`."""
    shares = torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels
    edges = torch.special.ndtri(shares).clamp(-std_range, std_range)
    density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
    return (-density.diff() / torch.special.ndtr(edges).diff()).float().tolist()


class ScalarQuantizer:
    """Encodes numbers to levels and decodes them, in float32.

    Args:
        positions: position of each level on the axis from -`std_range` to `std_range`, increasing.
        value_range: the numbers at the two ends of that axis; numbers outside take the outermost levels.
        std_range: half the length of the axis.

    Raises:
        StudioError: fewer than two levels, levels out of order, or an empty range.
    """

    def __init__(self, positions: Sequence[float], value_range: tuple[float, float], std_range: float):
        self.low, self.high = value_range
        self.std_range = std_range
        if not self.low < self.high or std_range <= 0:
            raise StudioError(
                f"Numbers need a range from low to high, not {shown(value_range)} and {shown(std_range)}."
            )
        self._positions = torch.tensor(positions, dtype=torch.float32, device="cpu")
        if len(positions) < 2 or not (self._positions.diff() > 0).all():
            raise StudioError("A quantiser needs two levels at least, each above the one before it.")

    def __len__(self) -> int:
        return len(self._positions)

    def values(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The value of each level, (levels,)."""
        return self._unplace(self._on(device))

    def place(self, numbers: torch.Tensor) -> torch.Tensor:
        """Positions of numbers of any shape on the axis of the levels, clamped to its ends."""
        spread = 2 * self.std_range
        shares = (numbers.float() - self.low) / (self.high - self.low)
        return (shares * spread - self.std_range).clamp(-self.std_range, self.std_range)

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """The nearest level of each number, int64; the lower of two equally near ones."""
        positions = self._on(numbers.device)
        return torch.bucketize(self.place(numbers).contiguous(), (positions[:-1] + positions[1:]) / 2)

    def decode(self, levels: torch.Tensor) -> torch.Tensor:
        """The values of levels of any shape."""
        return self._unplace(self._on(levels.device)[levels])

    def _unplace(self, positions: torch.Tensor) -> torch.Tensor:
        shares = (positions + self.std_range) / (2 * self.std_range)
        return shares * (self.high - self.low) + self.low

    def _on(self, device: torch.device | str) -> torch.Tensor:
        self._positions = self._positions.to(device)
        return self._positions
