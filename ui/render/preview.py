"""Previews of images whose tokens are only partly sampled."""

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_SHORTEST_PAUSE = 0.25  # seconds
_SHARE = 0.2  # of the time goes into previews, at most


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Images under way.

    Args:
        tokens: (batch, n) int64, the first n in raster order, n >= 1; or all (batch, L, D), continuous tokens or codes,
            which are -1 where nothing is sampled.
        known: (batch, L) bool, which of the latter are sampled, at least in part.
    """

    tokens: torch.Tensor
    known: torch.Tensor | None = None

    @property
    def sampled(self) -> int:
        """Sampled tokens of each image; of tokens of D codes, the number that all sampled codes would fill."""
        if self.known is None:
            return self.tokens.shape[1]
        if self.tokens.is_floating_point():
            return int(self.known[0].sum())
        return -(-int((self.tokens[0] >= 0).sum()) // self.tokens.shape[2])

    def of(self, rows: slice) -> "Sketch":
        """Some of the images."""
        return Sketch(self.tokens[rows], None if self.known is None else self.known[rows])

    @property
    def positions(self) -> frozenset[int] | None:
        """The positions of the sampled tokens of the first image, or `None` where they are the first ones."""
        return None if self.known is None else frozenset(torch.nonzero(self.known[0])[:, 0].tolist())


def partial_images(pipe: Any, sketch: Sketch) -> "list[Image]":
    """Decode images under way; cells that are not sampled yet are transparent.

    The first tokens of a `OneDPieceTokenizer` are a whole image.

    Args:
        pipe: the pipeline that samples them.
        sketch: their tokens so far.

    Returns:
        The images, RGBA.
    """
    tokens, known, total = sketch.tokens, sketch.known, pipe.transformer.num_tokens
    if pipe.transformer.config.get("row_length"):
        return [image.convert("RGBA") for image in pipe.decode_tokens(tokens)]
    grid = math.isqrt(total)
    if known is None:
        tokens = tokens[:, _continue_columns(sketch.sampled, total, grid)]
        known = (torch.arange(total) < sketch.sampled).expand(len(tokens), -1)
    return [_fade_out(image, cells.view(grid, grid)) for image, cells in zip(pipe.decode_tokens(tokens), known)]


def _continue_columns(sampled: int, total: int, grid: int) -> torch.Tensor:
    """The index (total,) of the token to show at each position: its own, or the last one sampled above it."""
    position = torch.arange(total)
    above = max(sampled - grid, 0) + (position - sampled) % min(grid, sampled)
    return torch.where(position < sampled, position, above)


def _fade_out(image: "Image", cells: torch.Tensor) -> "Image":
    """Make every cell transparent where `cells` (grid, grid) is false."""
    side = image.width // len(cells)
    alpha = (cells.cpu() * 255).to(torch.uint8).repeat_interleave(side, 0).repeat_interleave(side, 1)
    image = image.convert("RGBA")
    image.putalpha(_mask(alpha))
    return image


def _mask(alpha: torch.Tensor) -> "Image":
    from PIL import Image

    return Image.fromarray(alpha.numpy())


class Pace:
    """Decides when the next preview is due: not too often, and for a fifth of the time at most."""

    def __init__(self) -> None:
        self._due = 0.0

    def is_due(self) -> bool:
        """Whether it is time for a preview."""
        return time.monotonic() >= self._due

    def spent(self, seconds: float) -> None:
        """Record the cost of the last preview."""
        self._due = time.monotonic() + max(_SHORTEST_PAUSE, seconds * (1 / _SHARE - 1))
