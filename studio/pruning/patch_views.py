"""Where kept tokens lie in the image, as grids of the patches that the vision tower saw."""

from dataclasses import dataclass

import torch

from studio.pruning.layout import Layout

_WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class PatchView:
    """One look at the image.

    Args:
        name: "whole" for the image in one piece, "crops" for the canvas of all crops.
        box: left, top, right, bottom of the grid as fractions of the image's width and height; beyond 0 and 1 where
            the canvas is padded, within them where the tower did not see the image's margins.
        read: (rows, columns) bool, the patches that have a token (padding has none).
        kept: (rows, columns) bool, those whose token the language model receives.
        merged: (rows, columns) int64, equal for patches that were one token in the vision tower, -1 where `read` is
            false; `None` where none were.
    """

    name: str
    box: tuple[float, float, float, float]
    read: torch.Tensor
    kept: torch.Tensor
    merged: torch.Tensor | None = None


def patch_views(
    layout: Layout,
    kept: torch.Tensor,
    image_size: tuple[int, int],
    *,
    centred: bool,
    crops: bool,
    merged: torch.Tensor | None = None,
) -> tuple[PatchView, ...]:
    """The looks at one image; none where the layout is a row of tokens that tells no places.

    Args:
        layout: of the packed sequence.
        kept: places in it.
        image_size: width and height of the image.
        centred: whether the tower saw only the largest square in the middle.
        crops: whether the layout tells where the crops lie.
        merged: the token of each patch in the tower, (P, N); `None` where none were merged.
    """
    if layout.size[0] == 1 and 2 * image_size[0] < layout.size[1] * image_size[1]:
        return ()
    box = _middle_square(image_size) if centred else _WHOLE
    views = [_view("whole", box, layout.size, layout, layout.partition == 0, kept, merged)]
    on_canvas = layout.partition > 0
    if crops and on_canvas.any():
        box, size = _canvas(layout, on_canvas, image_size)
        merged = None if layout.grid is None else merged  # a canvas that the model has shrunk has other patches
        views.append(_view("crops", box, size, layout, on_canvas, kept, merged))
    return tuple(views)


def _view(
    name, box, size, layout: Layout, tokens: torch.Tensor, kept: torch.Tensor, merged: torch.Tensor | None
) -> PatchView:
    chosen = torch.zeros_like(tokens)
    chosen[kept] = True
    places = layout.row[tokens], layout.column[tokens]
    read, stays = torch.zeros(2, *size, dtype=torch.bool)
    read[places] = True
    stays[places] = chosen[tokens]
    if merged is None:
        return PatchView(name, box, read, stays)
    (height, width), partition = layout.size, layout.partition[tokens]
    inside = places[0] % height * width + places[1] % width
    groups = torch.full(size, -1)
    groups[places] = partition * height * width + merged.cpu()[partition, inside]
    return PatchView(name, box, read, stays, groups)


def _canvas(
    layout: Layout, on_canvas: torch.Tensor, image_size: tuple[int, int]
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Box and size of the canvas; one that the model has shrunk has no padding."""
    if layout.grid is None:
        return _WHOLE, (int(layout.row[on_canvas].max()) + 1, int(layout.column[on_canvas].max()) + 1)
    rows, columns = (side * number for side, number in zip(layout.size, layout.grid))
    width, height = image_size
    scale = min(columns / width, rows / height)
    beside, above = (columns / (scale * width) - 1) / 2, (rows / (scale * height) - 1) / 2
    return (-beside, -above, 1 + beside, 1 + above), (rows, columns)


def _middle_square(image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = image_size
    across, down = min(1, height / width) / 2, min(1, width / height) / 2
    return 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down
