"""The tokens of one image as planes of coloured squares: similar codes look similar.

A code's colour is its place along the three directions in which its codebook spreads most; a level or a latent, which
is a number by itself, has a grey.
"""

import dataclasses

import torch
import torch.nn.functional as F

from studio import KLTokenizer, OneDPieceTokenizer, RVQTokenizer, TokenBridgeTokenizer

_ROW = 16  # tokens in a row, of those that are no grid
_DARKEST, _LIGHTEST = 45, 235
_OUTLIERS = 0.02  # share of codes at either end whose colours may be cut off


@dataclasses.dataclass(frozen=True)
class TokenPlane:
    """A rectangle of tokens, or a row that is broken into lines.

    Args:
        title: which tokens of the image these are.
        columns: squares in a line.
        names: what each token is, as a text.
        colours: of each, as "#rrggbb".
        kept: whether the image was restored from each; a row's are, up to its length.
    """

    title: str
    columns: int
    names: list[str]
    colours: list[str]
    kept: list[bool]


def token_planes(tokenizer, tokens, how):
    """The planes of an image.

    Args:
        tokenizer: one that `studio.load` returns.
        tokens: what it encoded, (1, ...); rows of a `OneDPieceTokenizer` may be those of several tiles.
        how: keywords of its `decode`.
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


def _codes(title, numbers, codebook, columns=None, kept=None):
    colours = code_colours(codebook, numbers.flatten())
    names = [str(number) for number in numbers.flatten().tolist()]
    return TokenPlane(title, columns or numbers.shape[1], names, colours, kept or [True] * len(names))


def _greys(title, shades, numbers, form):
    names = [format(number, form) for number in numbers.flatten().tolist()]
    return TokenPlane(
        title, numbers.shape[1], names, _hex(shades.flatten()[:, None].expand(-1, 3)), [True] * len(names)
    )


@torch.inference_mode()
def code_colours(codebook, numbers):
    """Colours "#rrggbb" of codes (n,) of a codebook (V, C)."""
    vectors = codebook.float().cpu()
    centred = vectors - vectors.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    spread = centred @ axes
    low, high = spread.quantile(_OUTLIERS, dim=0), spread.quantile(1 - _OUTLIERS, dim=0)
    return _hex(F.pad(_stretched(spread, low, high), (0, 3 - spread.shape[1]), value=0.5)[numbers])


def _stretched(values, low, high):
    """Values with `low` at 0 and `high` at 1, cut off there."""
    return ((values - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)


def _hex(shades):
    """Shades (n, 3) in [0, 1] as colours that can be told from the page."""
    levels = (_DARKEST + (_LIGHTEST - _DARKEST) * shades).round().long().tolist()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in levels]
