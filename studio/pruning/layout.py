"""The geometry and the budget of the tokens of one image.

- `Layout`: the partition and the place of each token. A partition is one run of the vision tower: 0 is the
  thumbnail (the whole image), 1, 2, ... are crops, row by row over a grid. The packed sequence is what the language
  model receives for the image, in its order, without padding.
- `with_newlines`: which newline embeddings stay, so that newlines and content together are exactly the budget.
- `count`, `apportion`: how many tokens are kept, and how a number is divided among parts without losing any.
- `patch_views`: where kept tokens lie in the image, as grids of the patches that the vision tower saw.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real

import torch

from studio.checks import check_choice, shown
from studio.errors import StudioError

NEWLINE = -1


@dataclass(frozen=True, eq=False)
class Layout:
    """The packed sequence of one image.

    Args:
        partition: (T,) long, the partition of each token; -1 for a newline embedding.
        row, column: (T,) long, its place: in its own partition for the thumbnail, on the canvas of all crops for a crop
            (padding counts, so that `row // height` is the crop's row in the grid). For a newline `column` is -1.
        size: height and width of a partition in tokens; N is their product.
        grid: rows and columns of crops; `None` when there are no crops, or when crop tokens are no longer those of the
            vision tower (a canvas that the model has shrunk).

    Raises:
        StudioError: the three tensors are not equally long.
    """

    partition: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    size: tuple[int, int]
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        if not self.partition.shape == self.row.shape == self.column.shape or self.partition.dim() != 1:
            raise StudioError("partition, row and column of a layout must be vectors of the same length.")

    @classmethod
    def plain(cls, height: int, width: int) -> "Layout":
        """One partition and nothing else: LLaVA-1.5, or a Qwen image of height x width tokens."""
        return cls.from_ids(torch.arange(height * width), (height, width))

    @classmethod
    def from_ids(cls, ids: torch.Tensor, size: tuple[int, int], grid: tuple[int, int] | None = None) -> "Layout":
        """From ids (T,): partition * N + token, and -1 for a newline.

        Raises:
            StudioError: an id outside the thumbnail and the crops of the grid.
        """
        ids = ids.long().cpu()
        height, width = size
        partitions = 1 + (grid[0] * grid[1] if grid else 0)
        if ids.numel() == 0 or ids.min() < NEWLINE or ids.max() >= partitions * height * width:
            raise StudioError(f"The ids of a layout are -1 or from 0 to {partitions * height * width - 1}.")
        newline = ids == NEWLINE
        partition, token = ids.div(height * width, rounding_mode="floor"), ids.remainder(height * width)
        row, column = token.div(width, rounding_mode="floor"), token.remainder(width)
        if grid:
            crop = (partition - 1).clamp(min=0)
            row = row + torch.where(partition > 0, crop.div(grid[1], rounding_mode="floor") * height, 0)
            column = column + torch.where(partition > 0, crop.remainder(grid[1]) * width, 0)
        row = torch.where(newline, torch.cat((row.new_zeros(1), row[:-1])), row)
        return cls(partition.masked_fill(newline, NEWLINE), row, column.masked_fill(newline, -1), (height, width), grid)

    @classmethod
    def anyres(
        cls, side: int, grid: tuple[int, int], image_size: tuple[int, int], *, newlines: bool = True
    ) -> "Layout":
        """As LLaVA-NeXT packs an image: thumbnail, then the canvas of crops without padding, a newline after each row.

        Args:
            side: a partition is side x side tokens.
            grid: rows and columns of crops.
            image_size: height and width of the image in pixels.
            newlines: whether the newlines are there.
        """
        rows, columns = unpadded((grid[0] * side, grid[1] * side), image_size)
        row, column = (part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij"))
        crop = 1 + row.div(side, rounding_mode="floor") * grid[1] + column.div(side, rounding_mode="floor")
        canvas = (crop * side * side + row % side * side + column % side).view(len(rows), len(columns))
        if newlines:
            canvas = torch.nn.functional.pad(canvas, (0, 1), value=NEWLINE)
        return cls.from_ids(torch.cat((torch.arange(side * side), canvas.flatten())), (side, side), grid)

    def __len__(self) -> int:
        return self.partition.numel()

    @property
    def partitions(self) -> int:
        """P, thumbnail included."""
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)

    @cached_property
    def content(self) -> torch.Tensor:
        """Indices in the packed sequence of all tokens but newlines, in order."""
        return (self.partition != NEWLINE).nonzero().flatten()

    @cached_property
    def newlines(self) -> torch.Tensor:
        """Indices in the packed sequence of the newlines, in order."""
        return (self.partition == NEWLINE).nonzero().flatten()

    @cached_property
    def token(self) -> torch.Tensor:
        """(T,) number of each token in its partition, row by row; -1 for a newline."""
        height, width = self.size
        token = self.row.remainder(height) * width + self.column.remainder(width)
        return token.masked_fill(self.partition == NEWLINE, -1)

    @cached_property
    def ids(self) -> torch.Tensor:
        """(T,) partition * N + token; -1 for a newline."""
        ids = self.partition * (self.size[0] * self.size[1]) + self.token
        return ids.masked_fill(self.partition == NEWLINE, NEWLINE)

    @cached_property
    def newline_of(self) -> torch.Tensor:
        """(T,) place of the newline that ends each token's row; -1 without one, as in a thumbnail beside crops."""
        ends = torch.full((len(self),), -1)
        if len(self.newlines):
            after = torch.searchsorted(self.newlines, torch.arange(len(self)))
            ends = torch.cat((self.newlines, torch.tensor([-1])))[after]
            if (self.partition > 0).any():
                ends[self.partition == 0] = -1
        return ends.masked_fill(self.partition == NEWLINE, -1)

    def region(self, partition: int) -> torch.Tensor:
        """Indices in the packed sequence of one partition's tokens, in order."""
        return (self.partition == partition).nonzero().flatten()


def unpadded(canvas: tuple[int, int], image_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of a canvas that show the image, when it was scaled to fit and centred."""
    (height, width), (image_height, image_width) = canvas, image_size
    if image_width / image_height > width / height:
        cut = (height - int(round(image_height * width / image_width, 7))) // 2
        return torch.arange(cut, height - cut), torch.arange(width)
    cut = (width - int(round(image_width * height / image_height, 7))) // 2
    return torch.arange(height), torch.arange(cut, width - cut)


def layout_for(features: torch.Tensor, layout: Layout | None) -> Layout:
    """The layout of features (T, D); without one they are a single row.

    Raises:
        StudioError: features are not a matrix or the layout is of another length.
    """
    if features.dim() != 2 or not len(features):
        raise StudioError(f"Give the features of one image as (tokens, width), not {tuple(features.shape)}.")
    layout = layout or Layout.plain(1, len(features))
    if len(layout) != len(features):
        raise StudioError(
            f"The layout has {len(layout)} tokens, the features {len(features)}: give those of one image."
        )
    return layout


def frames_of(features: torch.Tensor, frames: int) -> torch.Tensor:
    """(T, n, D) float32 of the features (T * n, D) of a video.

    Raises:
        StudioError: features are not a matrix, or no whole frames.
    """
    if features.dim() != 2 or not len(features) or frames < 1 or len(features) % frames:
        raise StudioError(f"Give the features of {frames} frames as (tokens, width), not {tuple(features.shape)}.")
    return features.detach().float().unflatten(0, (frames, -1))


NEWLINES = ("row", "keep", "drop", "compete")


def check_newline(newline: str, *, compete: bool) -> None:
    """Check how newlines are treated.

    Raises:
        StudioError: an unknown name, or "compete" with a method that has no score for newlines.
    """
    check_choice("newline", newline, NEWLINES)
    if newline == "compete" and not compete:
        raise StudioError("This method has no score for newlines: choose row, keep or drop instead of compete.")


def with_newlines(pick: Callable[[int], torch.Tensor], budget: int, layout: Layout, newline: str) -> torch.Tensor:
    """Picks content tokens and adds newlines.

    Args:
        pick: for a number of content tokens, their places in the packed sequence; asked for at most `budget`.
        budget: content and newlines together, at least 1 and less than all.
        layout: of the packed sequence.
        newline: "row" keeps the newline of every row that keeps a content token; "keep" keeps all; "drop" none.

    Returns:
        (budget,) places, sorted. "drop" gives fewer when there is less content than `budget`, and so does "row" in an
        image so narrow that rows hold nothing but a newline; "row" gives one fewer, or leaves out one newline, where
        a budget of a few tokens has no room for both.

    Raises:
        StudioError: "keep" leaves no room for content.
    """
    contents = len(layout.content)
    if newline == "drop" or not len(layout.newlines):
        return pick(min(budget, contents)).sort().values
    if newline == "keep":
        if budget <= len(layout.newlines):
            raise StudioError(
                f"{budget} tokens are no room for {len(layout.newlines)} newlines and content: keep more, or use 'row'."
            )
        return torch.cat((pick(budget - len(layout.newlines)), layout.newlines)).sort().values
    return _with_rows(pick, budget, layout)


def in_order(
    features: torch.Tensor,
    budget: int | float,
    layout: Layout | None,
    newline: str,
    order: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    compete: bool = False,
) -> torch.Tensor:
    """The first picks of a greedy order of the content tokens, with newlines, exactly `budget`.

    Args:
        features, budget, layout, newline: as of a pruning method; "compete" makes newlines content.
        order: of places of content tokens, on the device of the features, and a number: which of them to pick, in
            order; the first picks must not depend on the number.
        compete: whether newlines may be content.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: a budget, layout or newline that does not fit.
    """
    check_newline(newline, compete=compete)
    layout = layout_for(features, layout)
    budget, device = count(budget, len(features)), features.device
    if budget == len(features):
        return torch.arange(len(features), device=device)
    if newline == "compete" or not len(layout.newlines):
        return order(torch.arange(len(features), device=device), budget).sort().values
    content = layout.content
    chosen = content[order(content.to(device), min(budget, len(content))).cpu()]
    return with_newlines(lambda picks: chosen[:picks], budget, layout, newline).to(device)


def _rows(chosen: torch.Tensor, layout: Layout) -> torch.Tensor:
    rows = layout.newline_of[chosen].unique()
    return rows[rows >= 0]


def _with_rows(pick, budget: int, layout: Layout) -> torch.Tensor:
    most = min(budget, len(layout.content))
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        chosen = pick(middle)
        low, high = (middle, high) if middle + len(_rows(chosen, layout)) <= budget else (low, middle - 1)
    chosen = pick(low)
    rows = _rows(chosen, layout)
    missing = budget - len(chosen) - len(rows)
    if missing < 0:
        return chosen.sort().values
    if missing:
        taken, ends = torch.zeros(len(layout), dtype=torch.bool), layout.newline_of
        taken[chosen] = True
        preferred = torch.cat((pick(most), layout.content))
        free = ~taken[preferred] & ((ends[preferred] < 0) | torch.isin(ends[preferred], rows))
        places = dict.fromkeys(preferred[free].tolist())
        chosen = torch.cat((chosen, torch.tensor([*places][:missing], dtype=torch.long)))
    return torch.cat((chosen, rows)).sort().values


def is_fraction(budget: object) -> bool:
    """Whether a budget is a share of the tokens, not a number of them."""
    return isinstance(budget, Real) and not isinstance(budget, Integral)


def count(budget: int | float, total: int) -> int:
    """The number of tokens a budget stands for.

    Args:
        budget: a whole number of tokens, from 1 up (more than `total` means all), or a fraction in (0, 1].
        total: how many tokens there are.

    Returns:
        A number from 1 to `total`; a fraction is rounded as Python's `round` does.

    Raises:
        StudioError: any other budget.
    """
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise StudioError(f"A budget is a number of tokens or a fraction above 0 and at most 1, not {shown(budget)}.")
    if is_fraction(budget):
        if not 0 < budget <= 1:
            raise StudioError(f"Keep a fraction of the tokens above 0 and at most 1, not {shown(budget)}.")
        return min(max(1, round(float(budget) * total)), total)
    if budget < 1:
        raise StudioError(f"Keep at least 1 token, not {shown(budget)}.")
    return min(int(budget), total)


def fraction(budget: int | float) -> float:
    """The budget as the ratio the authors' code takes.

    Raises:
        StudioError: anything but a fraction in (0, 1].
    """
    if not is_fraction(budget) or not 0 < budget <= 1:
        raise StudioError(f"The authors' numbers need a fraction above 0 and at most 1 as budget, not {shown(budget)}.")
    return float(budget)


def apportion(total: int, weights: list[float], caps: list[int]) -> list[int]:
    """Divides `total` in proportion to `weights`, no part above its cap, by largest remainder.

    What a cap cuts off goes to the other parts in proportion to their weights; parts without weight get something only
    when the others are full, in proportion to the room they have.

    Args:
        total: at least 0; more than all caps together means all of them.
        weights: one number of at least 0 for each part.
        caps: the most each part can take.

    Returns:
        Whole numbers that add up to `min(total, sum(caps))`.
    """
    left = float(min(total, sum(caps)))
    shares = [0.0] * len(caps)
    free = [part for part, cap in enumerate(caps) if cap > 0]
    while free and left > 1e-9:
        heavy = [part for part in free if weights[part] > 0]
        weight = {part: weights[part] for part in heavy} or {part: float(caps[part] - shares[part]) for part in free}
        scale = left / sum(weight.values())
        full = [part for part, w in weight.items() if w * scale >= caps[part] - shares[part]]
        for part in full or weight:
            given = caps[part] - shares[part] if full else weight[part] * scale
            shares[part] += given
            left -= given
        free = [part for part in free if part not in full] if full else []
    return _whole(shares, caps, min(total, sum(caps)))


def _whole(shares: list[float], caps: list[int], total: int) -> list[int]:
    parts = [min(math.floor(share + 1e-9), cap) for share, cap in zip(shares, caps)]
    by_remainder = sorted(range(len(parts)), key=lambda part: (parts[part] - shares[part], part))
    for part in by_remainder:
        if sum(parts) < total and parts[part] < caps[part]:
            parts[part] += 1
    return parts


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
