"""Where kept tokens lie in the picture: the grids of patches that the vision tower saw."""

from dataclasses import dataclass

import torch

from studio.pruning.layout import Layout

_WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class PatchView:
    """One look at the picture.

    Args:
        name: "whole" for the picture in one piece, "crops" for the canvas of all crops.
        box: left, top, right, bottom of the grid as fractions of the picture's width and height; beyond 0 and 1 where
            the canvas is padded, within them where the tower did not see the picture's margins.
        read: (rows, columns) bool, the patches that have a token (padding has none).
        kept: (rows, columns) bool, those whose token the language model receives.
    """

    name: str
    box: tuple[float, float, float, float]
    read: torch.Tensor
    kept: torch.Tensor


def patch_views(
    layout: Layout, kept: torch.Tensor, image_size: tuple[int, int], *, centred: bool, crops: bool
) -> tuple[PatchView, ...]:
    """The looks at one picture; none where the layout is a row of tokens that tells no places.

    Args:
        layout: of the packed sequence.
        kept: places in it.
        image_size: width and height of the picture.
        centred: whether the tower saw only the largest square in the middle.
        crops: whether the layout tells where the crops lie.
    """
    if layout.size[0] == 1 and 2 * image_size[0] < layout.size[1] * image_size[1]:
        return ()
    box = _middle_square(image_size) if centred else _WHOLE
    views = [_view("whole", box, layout.size, layout, layout.partition == 0, kept)]
    on_canvas = layout.partition > 0
    if crops and on_canvas.any():
        views.append(_view("crops", *_canvas(layout, on_canvas, image_size), layout, on_canvas, kept))
    return tuple(views)


def _view(name, box, size, layout: Layout, tokens: torch.Tensor, kept: torch.Tensor) -> PatchView:
    chosen = torch.zeros_like(tokens)
    chosen[kept] = True
    places = layout.row[tokens], layout.column[tokens]
    read, stays = torch.zeros(2, *size, dtype=torch.bool)
    read[places] = True
    stays[places] = chosen[tokens]
    return PatchView(name, box, read, stays)


def _canvas(layout: Layout, on_canvas: torch.Tensor, image_size: tuple[int, int]):
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
