"""Images at a size for the page."""

from PIL import Image

_SMALLEST, _LARGEST = 480, 1280  # px, the longer side of what is shown


def readable(image: Image.Image) -> Image.Image:
    """A copy that is large enough to see single patches, and small enough to send."""
    return resized(image, readable_size(image.size))


def readable_size(size: tuple[int, int]) -> tuple[int, int]:
    """The width and height in pixels of the copy: small ones are multiplied, large ones shrunk."""
    longest = max(size)
    scale = min(_LARGEST / longest, max(1, -(-_SMALLEST // longest)))
    width, height = size
    return max(1, round(width * scale)), max(1, round(height * scale))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A copy of this (width, height) in pixels, resampled as by `studio.decode_image`."""
    return image.copy() if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
