"""The plan of an image: what words say of each region of it, told to each cell of that region. Our addition.

A caption may end with one vector for every region of a coarse grid. A transformer could find the vector of a cell's
region by attention, but has to learn for every cell where to look; adding it to what the cell reads spares that. A
token of a row has no region: it learns from which of them it reads.
"""

import torch
from einops import rearrange
from torch import nn

from studio.errors import StudioError


def check_plan(plan_size: int, grid_size: int | None, vectors: int | None, row_length: int | None = None) -> None:
    """Raises a `StudioError` unless a plan of `plan_size` regions a side, if there is one, has its vectors, and divides
    the grid where there is no row."""
    if not plan_size:
        return
    if row_length is None and (grid_size is None or grid_size % plan_size):
        raise StudioError(f"A plan of {plan_size} x {plan_size} regions needs a grid that it divides, not {grid_size}.")
    if plan_size**2 > (vectors or 0):
        needed = f"captions of {plan_size**2} or more vectors, not {vectors}"
        raise StudioError(f"A plan of {plan_size} x {plan_size} regions needs {needed}.")


def plan_reader(plan_size: int, grid_size: int | None, row_length: int | None, dim: int) -> nn.Linear:
    """The layer by which tokens of a grid, or of a row, read a plan."""
    return PlanEmbeddings(plan_size, grid_size, dim) if grid_size else RowPlan(plan_size, row_length, dim)


def plan_layers(model: nn.Module) -> list[nn.Module]:
    """The layer by which a model reads its plan, or none."""
    return [model.plan_embeddings] if model.config.plan_size else []


class PlanEmbeddings(nn.Linear):
    """The last vectors of a caption to a vector for each cell.

    Args:
        plan_size: regions a side.
        grid_size: cells a side, a multiple of that.
        dim: width of a caption's vectors.
        cell_dim: width of what a cell gets; `dim` when None.
    """

    def __init__(self, plan_size: int, grid_size: int, dim: int, cell_dim: int | None = None):
        self.plan_size, self.cells = plan_size, grid_size // plan_size
        super().__init__(dim, self.cells**2 * (cell_dim or dim), bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, n, dim), of which the last `plan_size**2` are those of regions in raster order, to
        (B, grid_size**2, cell_dim), cells in raster order."""
        sizes = {"r": self.plan_size, "i": self.cells, "j": self.cells}
        of_regions = super().forward(vectors[:, -(self.plan_size**2) :])
        return rearrange(of_regions, "b (r c) (i j d) -> b (r i c j) d", **sizes)


class RowPlan(nn.Linear):
    """The last vectors of a caption to a vector for each token of a row.

    Attributes:
        shares: logits (row_length, plan_size**2) of how much a token reads from each region.

    Args:
        plan_size: regions a side.
        row_length: tokens of the row.
        dim: width of a caption's vectors and of what a token gets.
    """

    def __init__(self, plan_size: int, row_length: int, dim: int):
        super().__init__(dim, dim, bias=False)
        self.shares = nn.Parameter(torch.zeros(row_length, plan_size**2))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, n, dim), of which the last `plan_size**2` are those of regions in raster order, to
        (B, row_length, dim)."""
        return self.shares.softmax(dim=1) @ super().forward(vectors[:, -self.shares.shape[1] :])
