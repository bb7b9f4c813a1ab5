"""Images of which only the first tokens are sampled yet."""

import dataclasses
import math
import time

import torch

_SHORTEST_PAUSE = 0.25  # seconds
_SHARE = 0.2  # of the time may go into previews


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Images under way.

    Args:
        tokens: (batch, n) int64, the first n in raster order, n >= 1; or all (batch, L, D) of several numbers each,
            continuous ones or codes, which are -1 where nothing is sampled.
        known: (batch, L) bool, of which of the latter there is something to see.
    """

    tokens: torch.Tensor
    known: torch.Tensor | None = None

    @property
    def sampled(self):
        """Tokens of each image that are there; of stacks of codes, as many as the codes would fill."""
        if self.known is None:
            return self.tokens.shape[1]
        if self.tokens.is_floating_point():
            return int(self.known[0].sum())
        return -(-int((self.tokens[0] >= 0).sum()) // self.tokens.shape[2])

    @property
    def places(self):
        """Where those of the first image are, or `None` where they are the first."""
        return None if self.known is None else frozenset(torch.nonzero(self.known[0])[:, 0].tolist())


def partial_images(pipe, sketch):
    """Decode images under way with a loaded pipeline; cells that are not sampled yet stay transparent.

    The first tokens of a row, such as those of a `OneDPieceTokenizer`, are a whole image.

    Returns:
        A list of PIL images, RGBA.
    """
    tokens, known, total = sketch.tokens, sketch.known, pipe.transformer.num_tokens
    if pipe.transformer.config.get("row_length"):
        return [image.convert("RGBA") for image in pipe.decode_tokens(tokens)]
    grid = math.isqrt(total)
    if known is None:
        tokens = tokens[:, _continue_columns(sketch.sampled, total, grid)]
        known = (torch.arange(total) < sketch.sampled).expand(len(tokens), -1)
    return [_fade_out(image, cells.view(grid, grid)) for image, cells in zip(pipe.decode_tokens(tokens), known)]


def _continue_columns(sampled, total, grid):
    """Which sampled token stands at each position: its own, or the last one sampled above (so that little bleeds
    in)."""
    position = torch.arange(total)
    above = max(sampled - grid, 0) + (position - sampled) % min(grid, sampled)
    return torch.where(position < sampled, position, above)


def _fade_out(image, cells):
    """Make every cell transparent where `cells` (grid, grid) is false."""
    side = image.width // len(cells)
    alpha = (cells.cpu() * 255).to(torch.uint8).repeat_interleave(side, 0).repeat_interleave(side, 1)
    image = image.convert("RGBA")
    image.putalpha(_mask(alpha))
    return image


def _mask(alpha):
    from PIL import Image

    return Image.fromarray(alpha.numpy())


class Pace:
    """Says when the next preview is due: not too often, and never for more than a fifth of the time."""

    def __init__(self):
        self._due = 0.0

    def is_due(self):
        return time.monotonic() >= self._due

    def spent(self, seconds):
        """Note what the last preview cost."""
        self._due = time.monotonic() + max(_SHORTEST_PAUSE, seconds * (1 / _SHARE - 1))
