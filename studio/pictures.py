"""Reading a picture file that anybody may have made: whole, upright, RGB, or one sentence why not."""

import warnings
from pathlib import Path

from studio.errors import StudioError

MOST_PIXELS = 64_000_000
SMALLEST_SIDE = 8
LONGEST_RATIO = 100


def open_picture(path, name=None, most_pixels=MOST_PIXELS):
    """Read a picture as a person sees it.

    Args:
        path: a file that Pillow reads. Of an animation the first frame counts, transparency is put on white, 16-bit and
            CMYK colours become 8-bit RGB, and a camera's rotation is applied.
        name: what messages call it; its path when `None`.
        most_pixels: the most it may have, at most 64 million.

    Returns:
        A PIL image in mode RGB.

    Raises:
        StudioError: no such file, no picture, a damaged one, one with too many pixels, a side under 8 pixels, or a
            side more than 100 times the other.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path).expanduser()
    name = name or path
    if not path.is_file():
        raise StudioError(f"There is no picture {name}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            check_pixels(name, *picture.size, most_pixels)
            _check_shape(name, *picture.size)
            picture.seek(0)
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
    except StudioError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        big = isinstance(error, Image.DecompressionBombError)
        reason = "is too large: give one of at most 64 million pixels" if big else "is not a picture that can be read"
        raise StudioError(f"{name} {reason}.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise StudioError(f"{name} is damaged and cannot be read whole: {error}.") from error


def check_pixels(name, width, height, most_pixels=MOST_PIXELS):
    """Raises a `StudioError` for a size of more pixels than that."""
    if width * height > most_pixels:
        most = f"{most_pixels / 1e6:g} million" if most_pixels >= 1e6 else f"{most_pixels}"
        raise StudioError(f"{name} has {width} x {height} pixels: give a picture of at most {most}.")


def _check_shape(name, width, height):
    if min(width, height) < SMALLEST_SIDE:
        raise StudioError(f"{name} has {width} x {height} pixels: give a picture of at least {SMALLEST_SIDE} a side.")
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise StudioError(f"{name} has {width} x {height} pixels: cut it so that no side is 100 times the other.")


def _rgb(picture):
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        import numpy as np

        values = np.asarray(picture, dtype=np.float64)
        whole = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values / whole * 255).clip(0, 255).round().astype("uint8")).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
