"""Reading of images from any source: complete, upright and RGB, or an error in one sentence.

There is one reader. `open_image` reads a file, and `rgb_image` an image that Pillow has open already; both end in the
same pixels, so a file gives the same tokens on the command line, in the app and from `Image.open`.

Levels are scaled by the mode of an image, never by what it shows: integers of more than 8 bits (`I;16`, `I`) run from 0
to 65,535, as 16-bit files have them, floating-point numbers (`F`) from 0 to 1, as TIFF has them. What lies outside is
black or white. Transparency is put on white.
"""

import os
import warnings
from io import BytesIO
from typing import TYPE_CHECKING

from studio.errors import StudioError
from studio.files import user_path

if TYPE_CHECKING:
    from PIL import Image


MOST_PIXELS = 64_000_000
SMALLEST_SIDE = 8
LONGEST_RATIO = 100
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that are decoded. Pillow knows more, but some of its readers run other programs or ignore the size."""

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_ORIENTATION_TAG = 0x0112
_READ = "give a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file"


def open_image(path: str | os.PathLike, name: str | None = None, most_pixels: int = MOST_PIXELS) -> "Image.Image":
    """Read an image as it is displayed.

    Args:
        path: a file of one of `FORMATS`, whatever it is called. Of an animation the first frame counts, transparency is
            put on white, deeper colours become 8-bit RGB, and a camera's rotation is applied.
        name: what messages call it; its path when `None`.
        most_pixels: the most it may have, at most 64 million.

    Returns:
        A PIL image in mode RGB.

    Raises:
        StudioError: no such file, no image of these formats, a damaged one, one with too many pixels, a side under 8
            pixels, or a side more than 100 times the other.
    """
    path = user_path(os.fspath(path))
    name = name or str(path)
    if not os.path.isfile(path):
        raise StudioError(f"There is no image {name}.")
    try:
        with open(path, "rb") as file:
            return _read(file, name, most_pixels)
    except OSError as error:
        raise StudioError(f"{name} cannot be read: {error.strerror or error}.") from error


def read_image(data: bytes, name: str = "The image", most_pixels: int = MOST_PIXELS) -> "Image.Image":
    """Read the bytes of an image file; arguments, result and errors as of `open_image`."""
    return _read(BytesIO(data), name, most_pixels)


def read_alpha(data: bytes, name: str = "The image", most_pixels: int = MOST_PIXELS) -> "Image.Image | None":
    """Read how opaque the pixels of an image file are; arguments, size and errors as of `read_image`.

    Returns:
        A PIL image in mode L, 0 where the image is fully transparent; `None` for a file without transparency.
    """
    return _read(BytesIO(data), name, most_pixels, _alpha)


def _read(file, name, most_pixels, converted=None):
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise StudioError(f"{name} {_why_unknown(file)}.") from error
    except Image.DecompressionBombError as error:
        raise StudioError(f"{name} is too large: give one of at most 64 million pixels.") from error
    except Exception as error:  # decoders of foreign bytes raise whatever they stumble over
        raise StudioError(_damaged(name, error)) from error
    with image:
        check_pixels(name, *image.size, most_pixels)
        check_shape(name, *image.size)
        return _upright(image, name, converted or _rgb)


def rgb_image(image: object, name: str = "The image") -> "Image.Image":
    """Convert an image that Pillow has opened as `open_image` does.

    Args:
        image: a PIL image of any mode, of an animation the frame that it stands at; an orientation tag is applied.
        name: what messages call it.

    Returns:
        A PIL image in mode RGB.

    Raises:
        StudioError: no PIL image, one without or with too many pixels, a damaged one, or one whose colours have no RGB.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise StudioError(f"An image is a PIL image, not a {type(image).__name__}: open it with PIL.Image.open.")
    if min(image.size) < 1:
        raise StudioError(f"{name} has no pixels.")
    return _upright(image, name, _rgb)


def check_pixels(name: str, width: int, height: int, most_pixels: int = MOST_PIXELS) -> None:
    """Check the number of pixels of an image.

    Raises:
        StudioError: more than `most_pixels`.
    """
    if width * height > most_pixels:
        most = f"{most_pixels / 1e6:g} million" if most_pixels >= 1e6 else f"{most_pixels}"
        raise StudioError(f"{name} has {width} x {height} pixels: give an image of at most {most}.")


def check_shape(name: str, width: int, height: int) -> None:
    """Check the sides of an image.

    Raises:
        StudioError: a side is too short for any model, or the sides are too unequal.
    """
    if min(width, height) < SMALLEST_SIDE:
        raise StudioError(f"{name} has {width} x {height} pixels: give an image of at least {SMALLEST_SIDE} a side.")
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise StudioError(f"{name} has {width} x {height} pixels: cut it so that no side is 100 times the other.")


def _upright(image, name, converted):
    """What `converted` makes of an image, turned as its orientation tag says."""
    check_pixels(name, *image.size)
    try:
        turn = _turn(image)
        _load(image)
        check_pixels(name, *image.size)
        read = converted(image if turn is None else image.transpose(turn))
    except StudioError:
        raise
    except Exception as error:  # decoders of foreign bytes raise whatever they stumble over
        raise StudioError(_damaged(name, error)) from error
    if read is not None:
        read.info = {}  # an orientation that was applied must not be applied again
    return read


def _why_unknown(file):
    file.seek(0)
    start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:
        return "is a HEIC photo, which is not read: save it as JPEG, or set the camera to its most compatible format"
    return f"is not an image that can be read: {_READ}"


def _damaged(name, error):
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name} is damaged and cannot be read whole: {reason.rstrip('.')}."


def _load(image):
    """Decode an image. Pillow maps an uncompressed file that it knows by name, and then turns a TIFF the wrong way."""
    name = getattr(image, "filename", None)
    if image.format != "TIFF" or not name:
        image.load()
        return
    image.filename = ""
    try:
        image.load()
    finally:
        image.filename = name


def _turn(image):
    """How to turn an image as its orientation tag says, or None; what else its EXIF holds, broken or not, is no matter.

    It is asked before an image is loaded: Pillow turns a TIFF itself as it loads it.
    """
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF tells no orientation
        return None
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) and image.format != "TIFF" else None


def _rgb(image):
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if _is_transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _alpha(image):
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    return image.convert("RGBA").getchannel("A") if _is_transparent(image) else None


def _is_transparent(image):
    return "A" in image.getbands() or "transparency" in image.info


def _eight_bits(image):
    """An image of one deep channel as RGB; a level that its file declares transparent is white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    whole = 1.0 if image.mode == "F" else 65535.0
    levels = np.nan_to_num(values.astype(np.float32) * np.float32(255 / whole)).clip(0, 255).round().astype("uint8")
    if isinstance(clear := image.info.get("transparency"), int):
        levels[values == clear] = 255
    return Image.fromarray(levels).convert("RGB")
