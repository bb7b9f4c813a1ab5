"""The ten named backgrounds, and compositing of an emoji on one."""

import numpy as np
import torch

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "gray": (150, 152, 158),
    "red": (214, 58, 58),
    "orange": (244, 148, 52),
    "yellow": (250, 218, 84),
    "green": (74, 168, 88),
    "blue": (62, 118, 214),
    "purple": (136, 84, 196),
    "pink": (246, 164, 196),
}
NAMES = tuple(BACKGROUNDS)
PALETTE = np.array([BACKGROUNDS[name] for name in NAMES], dtype=np.float32) / 255
"""RGB in [0, 1], (10, 3), in the order of `NAMES`."""


def compose(images: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Composite images over plain colours.

    Args:
        images: `(n, side, side, 4)` premultiplied RGBA, uint8.
        colours: `(n, 3)` RGB in [0, 1].

    Returns:
        `(n, 3, side, side)` float32 in [0, 1].
    """
    rgba = images.astype(np.float32) / 255
    rgb = rgba[..., :3] + (1 - rgba[..., 3:]) * np.asarray(colours, dtype=np.float32)[:, None, None, :]
    return np.ascontiguousarray(np.moveaxis(rgb.clip(0, 1), -1, 1))


def render(images: np.ndarray, sampled: np.ndarray) -> torch.Tensor:
    """Images (n, 3, side, side), a float32 tensor in [0, 1], of (concept, style, background) rows `sampled` (n, 3).

    `images` is what `load_images` returns.
    """
    return torch.from_numpy(compose(images[sampled[:, 0], sampled[:, 1]], PALETTE[sampled[:, 2]]))
