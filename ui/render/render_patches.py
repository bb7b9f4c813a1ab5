"""The image as a pruned model reads it: kept patches in full, the others faint, lines around merged ones."""

from typing import Any

import numpy as np
from PIL import Image

from studio.ui.render.sizes import readable

_FAINT = 44  # of 255
_LINE = (120, 113, 108, 255)  # red, green, blue, alpha


def render_patches(image: Image.Image, view: Any) -> Image.Image:
    """Render one view of an image.

    Args:
        image: RGB.
        view: one of `Answer.views`.

    Returns:
        An RGBA image of the same aspect ratio, faint where the language model receives no token. Where patches were
        merged, lines are between those of different tokens of the vision tower.
    """
    shown = readable(image)
    left, top, right, bottom = view.box
    columns, on_grid_x = _cells(shown.width, left, right, view.kept.shape[1])
    rows, on_grid_y = _cells(shown.height, top, bottom, view.kept.shape[0])
    kept = view.kept.numpy()[rows][:, columns] & on_grid_y[:, None] & on_grid_x
    shown.putalpha(Image.fromarray(np.where(kept, 255, _FAINT).astype(np.uint8)))
    if view.merged is not None:
        shown.paste(_LINE, mask=Image.fromarray(_edges(view.merged.numpy()[rows][:, columns])))
    return shown


def _edges(groups: np.ndarray) -> np.ndarray:
    """Where a pixel (H, W) has another group than the one to the left or above."""
    edges = np.zeros(groups.shape, bool)
    edges[:, 1:] = groups[:, 1:] != groups[:, :-1]
    edges[1:] |= groups[1:] != groups[:-1]
    return edges


def _cells(pixels: int, start: float, end: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of a side: the number of its cell, and whether it has one."""
    position = ((np.arange(pixels) + 0.5) / pixels - start) / (end - start) * count
    cell = np.floor(position).astype(int)
    return cell.clip(0, count - 1), (cell >= 0) & (cell < count)
