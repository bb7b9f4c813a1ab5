"""A picture cut into squares of a tokenizer's size, each a row of tokens, and put together again."""

import time

from studio.errors import StudioError

_MOST_PIXELS = 1 << 20  # of all squares: what is shown, and tried with other codecs at every quality


def restored_tiles(picture, tokenizer, count, name):
    """Restore a picture from the first tokens of each of its tiles.

    Args:
        picture: a PIL image in RGB.
        tokenizer: a One-D-Piece tokenizer.
        count: tokens of each tile.
        name: what its `.odp` file calls the tokenizer.

    Returns:
        "decoded", "tiles", "planes", "tokens", "bits", "file", "psnr" and "seconds" of a `Restoration`.

    Raises:
        StudioError: the tiles are too many for a page.
    """
    from studio import OdpFile
    from studio.evaluation.bench_tokenizers import size_of
    from studio.pipelines.picture_codec import (
        encode_squares,
        picture_psnr,
        restore_picture,
        squares_of,
        token_bits,
        tokenizer_checksum,
    )
    from studio.ui.token_planes import token_planes

    side, how = tokenizer.config.sample_size, {"length": count}
    _check_number(picture.size, side)
    began = time.perf_counter()
    tokens = encode_squares(squares_of(picture, side, True), tokenizer)
    encoded = time.perf_counter()
    restored = restore_picture(tokens, len(tokens) * count, picture.size, True, tokenizer)
    decoded = time.perf_counter()
    kept = tuple(tokens[:, :count].flatten().tolist())
    file = OdpFile(name, tokenizer_checksum(tokenizer), *picture.size, True, token_bits(tokenizer), kept)
    return {
        "decoded": restored,
        "tiles": len(tokens),
        "planes": token_planes(tokenizer, tokens, how),
        "file": file.to_bytes(),
        "psnr": picture_psnr(restored, picture),
        "seconds": {"encode": encoded - began, "decode": decoded - encoded},
        **{quantity: len(tokens) * each for quantity, each in size_of(tokenizer, tokens, how).items()},
    }


def _check_number(size, side):
    width, height = size
    tiles, most = -(-width // side) * -(-height // side), max(1, _MOST_PIXELS // side**2)
    if tiles > most:
        raise StudioError(
            f"This picture has {tiles} tiles of {side} x {side} pixels, and this tab cuts at most {most}: give a "
            "smaller picture, leave out the tiles, or use `studio tokenize --tile`."
        )
