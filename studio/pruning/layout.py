"""The geometry of the tokens of one image.

`Layout` holds the partition and the place of each token. A partition is one run of the vision tower: 0 is the
thumbnail (the whole image), 1, 2, ... are crops, row by row over a grid. The packed sequence is what the language
model receives for the image, in its order, without padding.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

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
