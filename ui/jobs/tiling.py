"""An image as tiles of a tokenizer's size, each encoded by itself."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from studio.errors import StudioError

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio import OneDPieceTokenizer

_MOST_PIXELS = 1 << 20  # of all tiles; other codecs are tried at every quality


def restored_tiles(
    image: "Image", tokenizer: "OneDPieceTokenizer", count: int, name: str, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Restore an image from the first tokens of each of its tiles.

    Args:
        image: in RGB.
        tokenizer: encodes each tile.
        count: tokens of each tile, from 1 to all.
        name: of the tokenizer, written to the `.odp` file.
        stopped: returns True once nobody waits for the result.

    Returns:
        "decoded", "tiles", "planes", "tokens", "bits", "file", "psnr" and "seconds" of a `Restoration`.

    Raises:
        StudioError: too many tiles for a page.
        Stopped: `stopped` returned True.
    """
    from studio import encode_image
    from studio.bench.tokenizers import size_of
    from studio.ui.render.token_planes import token_planes

    tiles, how = _number_of_tiles(image.size, tokenizer.config.sample_size), {"length": count}
    encoded = encode_image(image, tokenizer, length=tiles * count, tile=True, name=name, stopped=stopped)
    return {
        "decoded": encoded.restored,
        "tiles": tiles,
        "planes": token_planes(tokenizer, encoded.tokens, how),
        "file": encoded.data,
        "psnr": encoded.psnr,
        "seconds": encoded.seconds,
        **{quantity: tiles * each for quantity, each in size_of(tokenizer, encoded.tokens, how).items()},
    }


def _number_of_tiles(size: tuple[int, int], side: int) -> int:
    width, height = size
    tiles, most = -(-width // side) * -(-height // side), max(1, _MOST_PIXELS // side**2)
    if tiles > most:
        raise StudioError(
            f"This image has {tiles} tiles of {side} x {side} pixels, and this tab cuts at most {most}: give a "
            "smaller image, leave out the tiles, or use `studio tokenize --tile`."
        )
    return tiles
