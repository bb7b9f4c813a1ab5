"""Images at a size that can be looked at and sent."""

from PIL import Image

_SMALLEST, _LARGEST = 480, 1280  # px, the longer side of what is shown


def readable(image):
    """A copy of a PIL image that is large enough to see single patches, and small enough to send."""
    return resized(image, readable_size(image.size))


def readable_size(size):
    """What becomes of a width and a height, in pixels: small ones are multiplied, large ones shrunk."""
    longest = max(size)
    scale = min(_LARGEST / longest, max(1, -(-_SMALLEST // longest)))
    return tuple(max(1, round(side * scale)) for side in size)


def resized(image, size):
    """A copy of that (width, height) in pixels, made as `studio.decode_image` makes it."""
    return image.copy() if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
