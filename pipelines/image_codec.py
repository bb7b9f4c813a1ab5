"""Encodes images to the bytes of an `.odp` file and decodes them (One-D-Piece, arXiv:2501.10064, section 4).

The whole image is resized to the tokenizer's square and restored at its own size. Cut into tiles it keeps its detail,
at the cost of tokens for each tile. There is no entropy coder: a token costs the bits of its index.
"""

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from PIL import Image

from studio.checks import check_flag, check_integer, check_number
from studio.errors import StudioError, check_stopped
from studio.images import rgb_image
from studio.pipelines.odp_file import MOST_PIXELS, OdpFile
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.refinement import check_steps, refined_tokens

StopCheck = Callable[[], bool] | None

MOST_TILE_PIXELS = MOST_PIXELS * 3 // 2
_AT_ONCE = 64
_REFINED_AT_ONCE = 16


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image.

    Attributes:
        file: the parsed file.
        data: the bytes of the file.
        psnr: of the restored image in dB, over 8-bit RGB at its own size; infinite if it is equal.
        restored: the image that `decode_image` returns for the bytes.
        tokens: (tiles, N) int64, including those that the file leaves out; one row without tiles. Refined tokens are
            optimised for their length.
        seconds: "encode" for the tokens, including the search for a length and refinement, and "decode" for the
            restored image.
    """

    file: OdpFile
    data: bytes
    psnr: float
    restored: Image.Image = field(compare=False, repr=False)
    tokens: torch.Tensor = field(compare=False, repr=False)
    seconds: dict[str, float] = field(compare=False)


def encode_image(
    image: Image.Image,
    tokenizer: OneDPieceTokenizer,
    *,
    length: int | None = None,
    psnr: float | None = None,
    size: int | None = None,
    tile: bool = False,
    refine: int = 0,
    name: str = "",
    stopped: StopCheck = None,
) -> EncodedImage:
    """Encodes an image to the bytes of an `.odp` file.

    Args:
        image: a PIL image of any mode, read as `studio.images.rgb_image` does.
        tokenizer: a One-D-Piece tokenizer.
        length: number of tokens to keep, over all tiles; all when length, psnr and size are None.
        psnr: instead, keep the fewest tokens whose restored image reaches this PSNR in dB, found by bisection.
        size: instead, keep the most tokens whose file has at most so many bytes.
        tile: cut the image into squares of the tokenizer's size instead of resizing it.
        refine: steps of refinement, 0 to 10,000 (`studio.tokenizers.refinement`); with `psnr` at every length tried.
        name: the tokenizer's bundled name, which is written into the file.
        stopped: called before each batch of tiles is encoded, refined or decoded; True stops.

    Raises:
        StudioError: more than one of length, psnr and size, a length out of range, a target that cannot be met, an
            invalid number of steps, or more tiles than an image of 64 million pixels has.
        Stopped: `stopped` returned True.

    Example:
        >>> data = studio.encode_image(image, tokenizer, length=32).data
        >>> restored = studio.decode_image(data, tokenizer)
    """
    if sum(target is not None for target in (length, psnr, size)) > 1:
        raise StudioError("Choose one of length, psnr and size: each determines the number of tokens.")
    refine, image = check_steps(refine), rgb_image(image)
    if length is not None:
        length = check_integer("length", length, 1)
    if size is not None:
        size = check_integer("size", size, 1)
    if psnr is not None:
        psnr = check_number("psnr", psnr)
    tile = check_flag("tile", tile)
    tiles = count_tiles(image.size, tokenizer.config.sample_size) if tile else 1
    checksum, bits = tokenizer_checksum(tokenizer), token_bits(tokenizer)
    began = time.perf_counter()
    squares = _squares(image, tokenizer.config.sample_size, tile)
    fewest, most = tiles, tiles * tokenizer.config.num_tokens

    @cache
    def tokens_of(count: int) -> torch.Tensor:
        return _refine(squares, tokenizer, tile_lengths(count, fewest), refine, stopped) if refine else encoded()

    @cache
    def encoded() -> torch.Tensor:
        return _encode(squares, tokenizer, stopped)

    def file_of(kept: tuple[int, ...]) -> OdpFile:
        return OdpFile(name, checksum, *image.size, tile, bits, kept)

    def bytes_of(count: int) -> int:
        return len(file_of((0,) * count).to_bytes())

    def fits(count: int) -> bool:
        return size is not None and bytes_of(count) <= size

    def close_enough(count: int) -> bool:
        return psnr is not None and reached(count) >= psnr

    @cache
    def reached(count: int) -> float:
        return image_psnr(_restore(tokens_of(count), count, image.size, tile, tokenizer, stopped), image)

    if size is not None:
        if not fits(fewest):
            least = bytes_of(fewest)
            raise StudioError(f"This image takes at least {least} bytes with this tokenizer; {size} are too few.")
        count = most if fits(most) else smallest(lambda n: not fits(n), fewest, most) - 1
    elif psnr is not None:
        if not close_enough(most):
            raise StudioError(
                f"All {most} tokens restore this image to {reached(most):.2f} dB, not to {psnr}: ask for less."
            )
        count = smallest(close_enough, fewest, most)
    else:
        count = most if length is None else length
        if not fewest <= count <= most:
            raise StudioError(f"This image has from {fewest} to {most} tokens with this tokenizer, not {count}.")
    tokens = tokens_of(count)
    seconds = {"encode": time.perf_counter() - began}
    rows = zip(tokens.tolist(), tile_lengths(count, fewest))
    file = file_of(tuple(token for row, first in rows for token in row[:first]))
    began = time.perf_counter()
    restored = _restore(tokens, count, image.size, tile, tokenizer, stopped)
    seconds["decode"] = time.perf_counter() - began
    return EncodedImage(file, file.to_bytes(), image_psnr(restored, image), restored, tokens, seconds)


def decode_image(
    data: bytes | OdpFile,
    tokenizer: OneDPieceTokenizer,
    name: str = "The file",
    stopped: StopCheck = None,
) -> Image.Image:
    """Decodes the bytes of an `.odp` file.

    Args:
        data: the bytes, or the result of `OdpFile.from_bytes`.
        tokenizer: the tokenizer that the image was encoded with.
        name: of the file in messages.
        stopped: called before each batch of tiles is decoded; True stops.

    Returns:
        A PIL image in mode RGB, of the size of the encoded one.

    Raises:
        StudioError: a damaged or foreign file, a file of another tokenizer, or one with more tiles than an image of 64
            million pixels has.
        Stopped: `stopped` returned True.
    """
    file = data if isinstance(data, OdpFile) else OdpFile.from_bytes(data, name)
    if file.checksum != tokenizer_checksum(tokenizer):
        raise StudioError(f"{name} was made with another tokenizer: give the one it was made with.")
    tiles = count_tiles((file.width, file.height), tokenizer.config.sample_size, name) if file.tiled else 1
    most, codes = tokenizer.config.num_tokens, tokenizer.config.codebook_size
    if not tiles <= len(file.tokens) <= tiles * most or file.bits != token_bits(tokenizer) or max(file.tokens) >= codes:
        raise StudioError(f"{name} is damaged: this tokenizer does not write such tokens.")
    rows, place = torch.zeros(tiles, most, dtype=torch.int64), 0
    for row, first in zip(rows, tile_lengths(len(file.tokens), tiles)):
        row[:first] = torch.tensor(file.tokens[place : place + first])
        place += first
    return _restore(rows, len(file.tokens), (file.width, file.height), file.tiled, tokenizer, stopped)


def tokenizer_checksum(tokenizer: OneDPieceTokenizer) -> int:
    """CRC-32 of names, shapes and weights; weights are rounded to bfloat16, so the dtype does not change it."""
    checksum = 0
    for name, weight in sorted(tokenizer.state_dict().items()):
        numbers = weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2")
        checksum = zlib.crc32(f"{name}{tuple(weight.shape)}".encode(), checksum)
        checksum = zlib.crc32(numbers.tobytes(), checksum)
    return checksum


def token_bits(tokenizer: OneDPieceTokenizer) -> int:
    """Bits of a token index in a file."""
    return max(1, (tokenizer.config.codebook_size - 1).bit_length())


def count_tiles(size: tuple[int, int], side: int, name: str = "The image") -> int:
    """Number of tiles of an image.

    Args:
        size: width and height of the image in pixels.
        side: of the tokenizer's square in pixels.
        name: of the image in messages.

    Raises:
        StudioError: the tiles have too many pixels, because the image is too large or extremely narrow.
    """
    columns, rows = (-(-length // side) for length in size)
    if columns * rows * side**2 > MOST_TILE_PIXELS:
        raise StudioError(
            f"{name} has {size[0]} x {size[1]} pixels, which are {columns * rows} tiles of {side} x {side}: give one "
            "without tiles, or of another shape."
        )
    return columns * rows


def tile_lengths(count: int, tiles: int) -> list[int]:
    """Number of tokens of each tile: `count` divided equally, with the remainder over the first tiles."""
    each, more = divmod(count, tiles)
    return [each + (index < more) for index in range(tiles)]


def smallest(meets: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from `low` to `high` that meets a monotone condition, by bisection; `high` meets it."""
    while low < high:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle + 1
    return high


def image_psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit RGB images of equal size; infinite for equal images."""
    first, second, total = np.asarray(one), np.asarray(other), 0
    for rows in range(0, len(first), 256):
        difference = first[rows : rows + 256].astype(np.int32) - second[rows : rows + 256]
        total += int(np.square(difference).sum(dtype=np.int64))
    return float("inf") if total == 0 else 10 * float(np.log10(255**2 * first.size / total))


def _corners(width: int, height: int, side: int) -> list[tuple[int, int]]:
    return [(left, top) for top in range(0, height, side) for left in range(0, width, side)]


def _squares(image: Image.Image, side: int, tile: bool) -> list[Image.Image]:
    """The squares to encode: the resized image, or its tiles, padded at the edges by repeating the last pixels."""
    if not tile:
        return [image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)]
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    return [
        Image.fromarray(padded[top : top + side, left : left + side]) for left, top in _corners(width, height, side)
    ]


@torch.inference_mode()
def _encode(squares: list[Image.Image], tokenizer: OneDPieceTokenizer, stopped: StopCheck) -> torch.Tensor:
    """Tokens (tiles, N) on the CPU."""
    parts = _batches(len(squares), _AT_ONCE, stopped)
    return torch.cat([tokenizer.encode(_images(squares[part], tokenizer)).cpu() for part in parts])


def _refine(
    squares: list[Image.Image], tokenizer: OneDPieceTokenizer, lengths: list[int], steps: int, stopped: StopCheck
) -> torch.Tensor:
    """Refined tokens (tiles, N) on the CPU."""
    parts = _batches(len(squares), _REFINED_AT_ONCE, stopped)
    found = [
        refined_tokens(tokenizer, _images(squares[part], tokenizer), lengths[part], steps, stopped) for part in parts
    ]
    return torch.cat([tokens.cpu() for tokens, _ in found])


def _batches(count: int, at_once: int, stopped: StopCheck) -> Iterator[slice]:
    """Slices of `count` tiles; raises `Stopped` before a slice when `stopped` returns True."""
    for start in range(0, count, at_once):
        check_stopped(stopped)
        yield slice(start, start + at_once)


def _images(squares: list[Image.Image], tokenizer: OneDPieceTokenizer) -> torch.Tensor:
    pixels = np.stack([np.asarray(square) for square in squares])
    return torch.from_numpy(pixels).movedim(-1, 1).to(tokenizer.device, tokenizer.dtype) / 127.5 - 1


@torch.inference_mode()
def _restore(
    tokens: torch.Tensor,
    count: int,
    size: tuple[int, int],
    tiled: bool,
    tokenizer: OneDPieceTokenizer,
    stopped: StopCheck,
) -> Image.Image:
    """The PIL image of the first `count` of the tokens (tiles, N), over all tiles."""
    lengths, side = tile_lengths(count, len(tokens)), tokenizer.config.sample_size
    width, height = size if tiled else (side, side)
    corners = _corners(width, height, side)
    whole = np.empty((height, width, 3), dtype=np.uint8)
    for part in _batches(len(tokens), _AT_ONCE, stopped):
        images = (tokenizer.decode(tokens[part].to(tokenizer.device), lengths[part]).float() + 1).clamp(0, 2) * 127.5
        for (left, top), square in zip(corners[part], images.round().to(torch.uint8).movedim(1, -1).cpu().numpy()):
            tile = whole[top : top + side, left : left + side]
            tile[:] = square[: tile.shape[0], : tile.shape[1]]
    image = Image.fromarray(whole)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
