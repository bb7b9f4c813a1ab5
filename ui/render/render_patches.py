"""The image as a pruned model reads it: kept patches in full, the others faint."""

import numpy as np
from PIL import Image

from studio.ui.render.sizes import readable

_FAINT = 44  # of 255


def render_patches(image, view):
    """Sample one look at an image.

    Args:
        image: a PIL image, RGB.
        view: one of `Answer.views`.

    Returns:
        An RGBA image of the same shape; faint where the language model receives nothing, also outside of the grid.
    """
    shown = readable(image)
    left, top, right, bottom = view.box
    columns, on_grid_x = _cells(shown.width, left, right, view.kept.shape[1])
    rows, on_grid_y = _cells(shown.height, top, bottom, view.kept.shape[0])
    kept = view.kept.numpy()[rows][:, columns] & on_grid_y[:, None] & on_grid_x
    shown.putalpha(Image.fromarray(np.where(kept, 255, _FAINT).astype(np.uint8)))
    return shown


def _cells(pixels, start, end, count):
    """For each pixel of a side: the number of its cell, and whether it has one."""
    place = ((np.arange(pixels) + 0.5) / pixels - start) / (end - start) * count
    cell = np.floor(place).astype(int)
    return cell.clip(0, count - 1), (cell >= 0) & (cell < count)
