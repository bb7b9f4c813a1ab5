"""An image cut into squares of a tokenizer's size, each a row of tokens, and put together again."""

from studio.errors import StudioError

_MOST_PIXELS = 1 << 20  # of all squares: what is shown, and tried with other codecs at every quality


def restored_tiles(image, tokenizer, count, name):
    """Restore an image from the first tokens of each of its tiles.

    Args:
        image: a PIL image in RGB.
        tokenizer: a One-D-Piece tokenizer.
        count: tokens of each tile.
        name: what its `.odp` file calls the tokenizer.

    Returns:
        "decoded", "tiles", "planes", "tokens", "bits", "file", "psnr" and "seconds" of a `Restoration`.

    Raises:
        StudioError: the tiles are too many for a page.
    """
    from studio import encode_image
    from studio.bench.tokenizers import size_of
    from studio.ui.render.token_planes import token_planes

    tiles, how = _number(image.size, tokenizer.config.sample_size), {"length": count}
    encoded = encode_image(image, tokenizer, length=tiles * count, tile=True, name=name)
    return {
        "decoded": encoded.restored,
        "tiles": tiles,
        "planes": token_planes(tokenizer, encoded.tokens, how),
        "file": encoded.data,
        "psnr": encoded.psnr,
        "seconds": encoded.seconds,
        **{quantity: tiles * each for quantity, each in size_of(tokenizer, encoded.tokens, how).items()},
    }


def _number(size, side):
    """How many tiles an image has."""
    width, height = size
    tiles, most = -(-width // side) * -(-height // side), max(1, _MOST_PIXELS // side**2)
    if tiles > most:
        raise StudioError(
            f"This image has {tiles} tiles of {side} x {side} pixels, and this tab cuts at most {most}: give a "
            "smaller image, leave out the tiles, or use `studio tokenize --tile`."
        )
    return tiles
