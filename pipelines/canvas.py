"""What in- and outpainting do with pixels: masks, windows, and pasting back.

The image is cut into square windows that cover what is to be redrawn. A window is resized to the model's size and
encoded; cells that the mask touches are sampled given the others, and the redrawn pixels are pasted into the image. So
outside the mask the result equals the input pixel by pixel, as with diffusers' `VaeImageProcessor.apply_overlay`. A
window that follows another takes its pixels as known, which makes images larger than the model's grid.

Hidden pixels do not reach the encoder: they are filled from what surrounds them, by averages that grow coarser with the
distance (the pull-push of Gortler et al., "The Lumigraph", 1996). A decoder does not restore known pixels exactly, so
that an edge would be seen. Redrawn pixels fade there, over `soft_edge` pixels, into a continuation of the known ones.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from studio.checks import check_integer, check_number, shown
from studio.errors import StudioError
from studio.images import check_pixels, check_shape, rgb_image

SIDES = ("left", "top", "right", "bottom")
MOST_WINDOWS = 256
_STEPS_A_WINDOW = 4


class Window(NamedTuple):
    """Part of a canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: torch.Tensor) -> torch.Tensor:
        """That part (..., height, width) of pixels (..., H, W), a view."""
        return pixels[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class EditRequest:
    """What a call redraws.

    Args:
        image: a PIL image, an array (H, W, 3) or a tensor (3, H, W); bytes, or numbers in [0, 1].
        mask_image: white (at least half of full) is redrawn; a PIL image, an array (H, W) or a tensor (H, W). Of
            another size than the image, it is resized. None: all of the image, which `strength` below 1 varies, or
            with `expand` only what is added.
        strength: share of the cells under the mask that is redrawn, above 0 and at most 1; which ones is random.
        expand: pixels to add by side, such as {"left": 64, "right": 64}.
        padding_mask_crop: windows are squares around the mask with such a margin, in pixels. None: squares of the
            shorter side of the image.
        soft_edge: pixels inside the mask over which it fades into what surrounds it. None: half as many as a cell has.

    Raises:
        StudioError: a value outside these.
    """

    image: Any = None
    mask_image: Any = None
    strength: float = 1.0
    expand: Mapping[str, int] | None = None
    padding_mask_crop: int | None = None
    soft_edge: int | None = None

    def canvas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The expanded image (3, H, W) float32 in [0, 1], 0 where added, and what is redrawn, (H, W) bool."""
        if self.image is None:
            raise StudioError("There is no image to edit: give image= with mask_image, strength or expand.")
        check_number("strength", self.strength, 0, 1, above=True)
        if self.soft_edge is not None:
            check_integer("soft_edge", self.soft_edge, 0, 1000)
        pixels = read_pixels(self.image)
        expand = check_expand(self.expand or {})
        if self.mask_image is not None:
            mask = read_mask(self.mask_image, (pixels.shape[1], pixels.shape[2]))
        else:
            mask = torch.full(pixels.shape[1:], not expand)
            if not expand and (self.padding_mask_crop, self.soft_edge) != (None, None):
                raise StudioError(
                    "padding_mask_crop and soft_edge belong to a mask: give mask_image, or leave them out."
                )
        if expand and self.strength < 1:
            raise StudioError("strength is for what is in the image: leave it out where you expand.")
        if bool(mask.all()) and self.strength == 1:
            raise StudioError(
                "The mask is white everywhere, so nothing of the image would stay: leave a part black, give a strength "
                "below 1, or generate without an image."
            )
        around = [expand.get(side, 0) for side in ("left", "right", "top", "bottom")]
        height, width = (length + sum(part) for length, part in zip(pixels.shape[1:], (around[2:], around[:2])))
        check_pixels("The expanded image", width, height)
        return F.pad(pixels, around), F.pad(mask, around, value=True)

    def windows(self, mask: torch.Tensor) -> Iterator[tuple[Window, torch.Tensor]]:
        """The windows that cover the mask (H, W) of the canvas, and what each of them redraws; see `cover`."""
        if self.padding_mask_crop is None:
            return cover(mask, min(read_pixels(self.image).shape[1:]))
        margin = check_integer("padding_mask_crop", self.padding_mask_crop, 0, max(mask.shape))
        rows, columns = (torch.nonzero(mask.any(dim=axis))[:, 0] for axis in (1, 0))
        side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1 + 2 * margin
        return cover(mask, min(side, *mask.shape), least_known=0.0)


EDIT_DEFAULTS = {name: field.default for name, field in EditRequest.__dataclass_fields__.items()}


def read_pixels(image: Any) -> torch.Tensor:
    """Pixels (3, H, W), float32 in [0, 1], of an image as `EditRequest` takes it.

    Raises:
        StudioError: another type or shape, numbers outside [0, 1], or sides that no model takes.
    """
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(rgb_image(image))).movedim(-1, 0)
    elif isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = (pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels).movedim(-1, 0)
    elif isinstance(image, torch.Tensor):
        pixels = image[0] if image.ndim == 4 and len(image) == 1 else image
    else:
        raise StudioError(f"The image is a PIL image, an array or a tensor, not {shown(image)}.")
    if pixels.ndim != 3 or len(pixels) != 3:
        raise StudioError(
            f"The image has the shape {tuple(image.shape)}: give an array (H, W, 3) or a tensor (3, H, W), one a call."
        )
    check_shape("The image", pixels.shape[2], pixels.shape[1])
    return _levels("The image", pixels)


def read_mask(mask: Any, size: tuple[int, int]) -> torch.Tensor:
    """What a mask redraws, (H, W) bool.

    Args:
        mask: as of `EditRequest`.
        size: height and width of the image.

    Raises:
        StudioError: another type or shape, numbers outside [0, 1], or a mask without white.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(rgb_image(mask, "The mask").convert("L"))
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise StudioError(f"The mask is a PIL image, an array or a tensor, not {shown(mask)}.")
    levels = torch.as_tensor(mask)
    while levels.ndim > 2 and 1 in (levels.shape[0], levels.shape[-1]):
        levels = levels[0] if len(levels) == 1 else levels[..., 0]
    if levels.ndim != 2 or not levels.numel():
        raise StudioError(f"The mask has the shape {tuple(mask.shape)}: give one of height and width only.")
    white = _levels("The mask", levels) >= 0.5
    if white.shape != size:
        warnings.warn(
            f"The mask has {white.shape[1]} x {white.shape[0]} pixels, the image {size[1]} x {size[0]}: it is resized.",
            stacklevel=2,
        )
        white = F.interpolate(white[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0] > 0
    if not white.any():
        raise StudioError("The mask has no white, so nothing would be redrawn: paint white what should change.")
    return white


def _levels(name, values):
    if values.dtype == torch.bool or values.dtype.is_floating_point:
        levels = values.detach().cpu().float()
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise StudioError(f"{name} has numbers outside [0, 1]: scale it to that, or give bytes.")
        return levels
    if values.dtype != torch.uint8:
        raise StudioError(f"{name} has the type {values.dtype}: give bytes, Booleans or numbers in [0, 1].")
    return values.detach().cpu().float() / 255


def check_expand(expand: Any) -> dict[str, int]:
    """Checks how many pixels are added by side; see `EditRequest`.

    Raises:
        StudioError: no mapping, another side, or no whole number.
    """
    if not isinstance(expand, Mapping) or not all(side in SIDES for side in expand):
        raise StudioError(f"expand names sides ({', '.join(SIDES)}), as in {{'left': 64}}, not {shown(expand)}.")
    return {side: pixels for side in expand if (pixels := check_integer(f"expand {side}", expand[side], 0))}


def cover(mask: torch.Tensor, side: int, least_known: float = 0.25) -> Iterator[tuple[Window, torch.Tensor]]:
    """Square windows that cover a mask (H, W) one after the other, and what is left for each to redraw (side, side).

    One window around the mask where that is enough, and `least_known` of it is known. Otherwise the next window is the
    one that redraws most among those of which at least half is known by then; where there is none, the one of which
    most is known.

    Raises:
        StudioError: more than 256 windows.
    """
    left, step = mask.clone(), max(1, side // _STEPS_A_WINDOW)
    rows, columns = (torch.nonzero(mask.any(dim=axis))[:, 0] for axis in (1, 0))
    tops = _positions(rows, mask.shape[0], side, step)
    lefts = _positions(columns, mask.shape[1], side, step)
    around = Window(tops[0], lefts[0], side, side)
    if bool(around.of(mask).sum() == mask.sum()) and (1 - float(around.of(mask).float().mean())) >= least_known:
        yield around, around.of(mask).clone()
        return
    for _ in range(MOST_WINDOWS):
        sums = F.pad(left.int().cumsum(0).cumsum(1), (1, 0, 1, 0))
        strips = sums[[top + side for top in tops]] - sums[tops]
        counts = strips[:, [edge + side for edge in lefts]] - strips[:, lefts]
        if not counts.any():
            return
        ready = (counts > 0) & (2 * counts <= side**2)
        score = torch.where(ready, counts, torch.where(counts > 0, -counts, -(side**2) - 1))
        best = int(score.argmax())
        window = Window(tops[best // len(lefts)], lefts[best % len(lefts)], side, side)
        yield window, window.of(left).clone()
        window.of(left)[:] = False
    raise StudioError(
        f"This takes more than {MOST_WINDOWS} windows of {side} pixels: expand by less, or use more padding."
    )


def _positions(marked, length, side, step):
    """Where windows may begin along an axis: around what is marked first, then in steps."""
    centre = (int(marked[0]) + int(marked[-1]) + 1 - side) // 2
    return list(dict.fromkeys([min(max(centre, 0), length - side), *range(0, length - side, step), length - side]))


def fill_hidden(pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Pixels (B, C, H, W) with those that are not known (B or 1, 1, H, W) filled in smoothly from those around."""
    if bool(known.all()) or not bool(known.any()):
        return torch.where(known, pixels, 0.0)
    even = [0, pixels.shape[3] % 2, 0, pixels.shape[2] % 2]
    weights = F.pad(known.to(pixels.dtype), even)
    share = F.avg_pool2d(weights, 2)
    coarse = F.avg_pool2d(F.pad(pixels, even) * weights, 2) / share.clamp(min=0.25)
    coarse = F.interpolate(fill_hidden(coarse, share > 0), scale_factor=2, mode="bilinear")
    return torch.where(known, pixels, coarse[..., : pixels.shape[2], : pixels.shape[3]])


def resized(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [0, 1] at another size."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


def blended(sampled: torch.Tensor, original: torch.Tensor, hidden: torch.Tensor, soft_edge: int) -> torch.Tensor:
    """Sampled pixels (B, 3, H, W) under the mask `hidden` (H, W), the original ones elsewhere; see `soft_edge`."""
    if soft_edge and not bool(hidden.all()):
        around, distance = _continued(original, ~hidden, soft_edge)
        sampled = torch.lerp(sampled, around, (soft_edge + 1 - distance).clamp(max=soft_edge) / soft_edge)
    return torch.where(hidden, sampled, original)


def _continued(values, known, reach):
    """Values (B, C, H, W) continued from where they are known (H, W): each pixel is the mean of those nearer to them.

    Only the pixels at one distance are worked on at a time, so the time does not grow with `reach`.

    Returns:
        The values, 0 beyond `reach`, and the distance (H, W) from a known pixel, in squares; `reach` + 1 beyond.
    """
    width = known.shape[1] + 2  # with a border of pixels that are not there
    beside = [-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1]
    distance = F.pad(torch.where(known, 0, reach + 1), (1, 1, 1, 1), value=-1).flatten()
    filled = F.pad(values * known, (1, 1, 1, 1)).flatten(2)
    rim = F.max_pool2d(known[None].float(), 3, stride=1, padding=1)[0] > 0
    places = torch.nonzero(F.pad(rim & ~known, (1, 1, 1, 1)).flatten())[:, 0]
    for step in range(1, reach + 1):
        near = [places + offset for offset in beside]
        count = sum((distance[each] >= 0) & (distance[each] < step) for each in near)
        filled[..., places] = sum(filled[..., each] for each in near) / count
        distance[places] = step
        places = torch.cat([each[distance[each] > step] for each in near]).unique()
        if not len(places):
            break
    inner = (slice(1, -1), slice(1, -1))
    shape = (known.shape[0] + 2, width)
    return filled.unflatten(2, shape)[:, :, *inner], distance.view(shape)[inner]


def hidden_cells(
    hidden: torch.Tensor, grid: int | None, length: int, strength: float, generators: list[torch.Generator]
) -> torch.Tensor:
    """Which of the positions of B images are sampled, (B, length) bool.

    Args:
        hidden: pixels (H, W) under the mask; a cell that it touches is hidden.
        grid: cells a side; None for a row, whose last positions are sampled.
        length: positions of an image.
        strength: share of the hidden positions that is sampled, at least one; of a grid at random.
    """
    if grid is None:
        cells = torch.arange(length) >= length - max(1, round(strength * length))
        return cells.expand(len(generators), -1)
    cells = F.adaptive_max_pool2d(hidden[None].float(), grid).flatten() > 0
    if strength == 1:
        return cells.expand(len(generators), -1)
    places, rows = torch.nonzero(cells)[:, 0], torch.zeros(len(generators), length, dtype=torch.bool)
    for row, generator in zip(rows, generators):
        chosen = torch.randperm(len(places), generator=generator, device=generator.device).cpu()
        row[places[chosen[: max(1, round(strength * len(places)))]]] = True
    return rows
