"""The tokens of one image as planes of coloured squares: similar codes have similar colours.

The colour of a code is its position along the first three principal components of its codebook; a level or a latent,
which is a number, has a grey.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from studio import KLTokenizer, OneDPieceTokenizer, RVQTokenizer, TokenBridgeTokenizer

_ROW = 16  # tokens in a line, of tokens that are no grid
_DARKEST, _LIGHTEST = 45, 235
_OUTLIERS = 0.02  # fraction of codes at either end whose colours are clipped


@dataclasses.dataclass(frozen=True)
class TokenPlane:
    """A grid of tokens, or a sequence that is broken into lines.

    Args:
        title: which tokens of the image these are.
        columns: squares in a line.
        names: the code, level or latent of each, as text.
        colours: of each, as "#rrggbb".
        kept: whether the image was decoded from each.
    """

    title: str
    columns: int
    names: list[str]
    colours: list[str]
    kept: list[bool]


def token_planes(tokenizer: Any, tokens: torch.Tensor, how: Mapping[str, int]) -> list[TokenPlane]:
    """The planes of an image.

    Args:
        tokenizer: one that `studio.load` returns.
        tokens: (1, ...), those of `encode`; of a `OneDPieceTokenizer` (tiles, N).
        how: the keywords of `decode`.
    """
    if isinstance(tokenizer, OneDPieceTokenizer):
        length = tokens.shape[1]
        kept = [place < how["length"] for place in range(length)]
        titles = ["Tokens"] if len(tokens) == 1 else [f"Tile {number}" for number in range(1, len(tokens) + 1)]
        rows = tokens.cpu().split(1)
        return [_codes(title, row, tokenizer.codebook, min(_ROW, length), kept) for title, row in zip(titles, rows)]
    tokens = tokens[0].cpu()
    if isinstance(tokenizer, RVQTokenizer):
        levels = zip(tokens.unbind(-1), tokenizer.codebooks)
        planes = [_codes(f"Level {number}", *level) for number, level in enumerate(levels, 1)]
        return [
            dataclasses.replace(plane, kept=[number < how["depth"]] * len(plane.names))
            for number, plane in enumerate(planes)
        ]
    if isinstance(tokenizer, TokenBridgeTokenizer):
        shades = tokens / (tokenizer.config.levels - 1)
        return [
            _greys(f"Dimension {number}", shade, level, "d")
            for number, (shade, level) in enumerate(zip(shades.unbind(-1), tokens.unbind(-1)), 1)
        ]
    if isinstance(tokenizer, KLTokenizer):
        return [
            _greys(f"Channel {number}", _stretched(latents, latents.min(), latents.max()), latents, ".1f")
            for number, latents in enumerate(tokens.float(), 1)
        ]
    return [_codes("Tokens", tokens, tokenizer.codebook)]


def _codes(
    title: str,
    numbers: torch.Tensor,
    codebook: torch.Tensor,
    columns: int | None = None,
    kept: list[bool] | None = None,
) -> TokenPlane:
    colours = code_colours(codebook, numbers.flatten())
    names = [str(number) for number in numbers.flatten().tolist()]
    return TokenPlane(title, columns or numbers.shape[1], names, colours, kept or [True] * len(names))


def _greys(title: str, shades: torch.Tensor, numbers: torch.Tensor, form: str) -> TokenPlane:
    names = [format(number, form) for number in numbers.flatten().tolist()]
    return TokenPlane(
        title, numbers.shape[1], names, _hex(shades.flatten()[:, None].expand(-1, 3)), [True] * len(names)
    )


@torch.inference_mode()
def code_colours(codebook: torch.Tensor, numbers: torch.Tensor) -> list[str]:
    """Colours "#rrggbb" of codes.

    Args:
        codebook: (V, C).
        numbers: (n,) int64, the codes.
    """
    vectors = codebook.float().cpu()
    centred = vectors - vectors.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    spread = centred @ axes
    low, high = spread.quantile(_OUTLIERS, dim=0), spread.quantile(1 - _OUTLIERS, dim=0)
    return _hex(F.pad(_stretched(spread, low, high), (0, 3 - spread.shape[1]), value=0.5)[numbers])


def _stretched(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Values with `low` at 0 and `high` at 1, cut off there."""
    return ((values - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)


def _hex(shades: torch.Tensor) -> list[str]:
    """Shades (n, 3) in [0, 1] as colours that differ from the page."""
    levels = (_DARKEST + (_LIGHTEST - _DARKEST) * shades).round().long().tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in levels]
