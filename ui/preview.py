"""Pictures of which only the first tokens are drawn yet."""

import math
import time

import torch

_SHORTEST_PAUSE = 0.25  # seconds
_SHARE = 0.2  # of the time may go into previews


def partial_pictures(pipe, tokens):
    """Decode the first tokens of pictures; what is not drawn yet stays transparent.

    Args:
        pipe: a loaded pipeline.
        tokens: (batch, n) int64, the first n tokens in raster order, n >= 1.

    Returns:
        A list of PIL images, RGBA.
    """
    total = pipe.transformer.num_tokens
    grid = math.isqrt(total)
    pictures = pipe.decode_tokens(tokens[:, _continue_columns(tokens.shape[1], total, grid)])
    return [_fade_out(picture, tokens.shape[1], grid) for picture in pictures]


def _continue_columns(drawn, total, grid):
    """Which drawn token stands at each position: its own, or the last one drawn above (so that little bleeds in)."""
    position = torch.arange(total)
    above = max(drawn - grid, 0) + (position - drawn) % min(grid, drawn)
    return torch.where(position < drawn, position, above)


def _fade_out(picture, drawn, grid):
    """Make every cell behind the first `drawn` ones transparent."""
    cell = picture.width // grid
    rows, columns = divmod(drawn, grid)
    alpha = torch.zeros(picture.height, picture.width, dtype=torch.uint8)
    alpha[: rows * cell] = 255
    alpha[rows * cell : (rows + 1) * cell, : columns * cell] = 255
    picture = picture.convert("RGBA")
    picture.putalpha(_mask(alpha))
    return picture


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
