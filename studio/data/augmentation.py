"""Random changes to images on a plain background."""

import numpy as np
import torch
import torch.nn.functional as F


def move(
    images: torch.Tensor,
    colours: torch.Tensor,
    rng: np.random.Generator,
    *,
    share: float,
    zoom: tuple[float, float],
    angle: float,
    shift: float,
) -> torch.Tensor:
    """Rotate, scale and shift a fraction of the images; the borders are filled with the background's colour.

    Args:
        images: (n, 3, H, W) in [0, 1].
        colours: (n, 3) backgrounds in [0, 1].
        rng: a `numpy.random.Generator`.
        share: probability that an image is moved.
        zoom: (low, high) factor of the sampling grid; above 1 the subject shrinks.
        angle: largest turn in radians.
        shift: largest shift, in halves of the image's side.

    Returns:
        New images of the same shape.
    """
    n = len(images)
    colours = torch.as_tensor(colours, dtype=images.dtype)[:, :, None, None]
    moved = torch.from_numpy(rng.random(n) < share)
    scale = torch.from_numpy(rng.uniform(*zoom, n)).float()
    turn = torch.from_numpy(rng.uniform(-angle, angle, n)).float()
    offset = torch.from_numpy(rng.uniform(-shift, shift, (n, 2))).float()
    rows = torch.stack((turn.cos(), -turn.sin()), 1), torch.stack((turn.sin(), turn.cos()), 1)
    matrix = torch.stack(rows, 1) * scale[:, None, None]
    grid = F.affine_grid(torch.cat((matrix, offset[..., None]), dim=2), list(images.shape), align_corners=False)
    warped = F.grid_sample(images - colours, grid, align_corners=False) + colours
    return torch.where(moved[:, None, None, None], warped, images)


def distort(images: torch.Tensor, colours: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Distort images as a generator or a tokenizer may: small moves, blur, brightness, noise.

    Takes and returns (n, 3, H, W) in [0, 1]; `colours` (n, 3) are the backgrounds.
    """
    n, side = len(images), images.shape[-1]
    images = move(images, colours, rng, share=0.7, zoom=(0.85, 1.2), angle=0.15, shift=0.12)
    factors = torch.from_numpy(rng.choice((1, 2, 3, 4), size=n, p=(0.4, 0.3, 0.2, 0.1)))
    for factor in (2, 3, 4):
        chosen = factors == factor
        if chosen.any():
            small = F.interpolate(images[chosen], size=side // factor, mode="bilinear", antialias=True)
            images[chosen] = F.interpolate(small, size=side, mode="bilinear", align_corners=False)
    brightness = torch.from_numpy(rng.uniform(0.92, 1.08, (n, 1, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    strength = torch.from_numpy(rng.uniform(0, 0.04, (n, 1, 1, 1))).float()
    return (images * brightness + noise * strength).clamp(0, 1)
