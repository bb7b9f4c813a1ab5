"""Region conditioning: each image token reads what the caption says about its region of the image. Our addition.

A caption may end with one vector for every region of a coarse grid. A transformer could find the vector of a token's
region by attention, but would have to learn for every token where to look. Adding the vector to the token's input
avoids that. Tokens of a row have no region; they learn which regions to read.

The configuration key `plan_size` and the weights `plan_embeddings.*` keep the names that saved models have.
"""

import torch
from einops import rearrange
from torch import nn

from studio.errors import StudioError


def check_region_conditioning(
    plan_size: int, grid_size: int | None, vectors: int | None, row_length: int | None = None
) -> None:
    """Checks that `plan_size` regions a side fit the captions and the image tokens.

    Args:
        plan_size: regions a side; 0 without region conditioning.
        grid_size: side of the token grid, a multiple of `plan_size`; None for a row.
        vectors: vectors of a caption, at least `plan_size**2`.
        row_length: tokens of a row; None for a grid.

    Raises:
        StudioError: the regions do not divide the grid, or captions have too few vectors.
    """
    if not plan_size:
        return
    regions = f"Region conditioning of {plan_size} x {plan_size} regions"
    if row_length is None and (grid_size is None or grid_size % plan_size):
        raise StudioError(f"{regions} needs a grid whose side is a multiple of {plan_size}, not {grid_size}.")
    if plan_size**2 > (vectors or 0):
        raise StudioError(f"{regions} needs captions of {plan_size**2} or more vectors, not {vectors}.")


class RegionConditioning(nn.Linear):
    """Projects the last vectors of a caption to a vector for each cell of the token grid.

    Args:
        plan_size: regions a side.
        grid_size: cells a side, a multiple of `plan_size`.
        dim: width of a caption's vectors.
        cell_dim: width of a cell's vector; `dim` when None.
    """

    def __init__(self, plan_size: int, grid_size: int, dim: int, cell_dim: int | None = None):
        self.plan_size, self.cells = plan_size, grid_size // plan_size
        super().__init__(dim, self.cells**2 * (cell_dim or dim), bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, grid_size**2, cell_dim) of the cells in raster order.

        Args:
            vectors: (B, n, dim), of which the last `plan_size**2` are those of the regions in raster order.
        """
        sizes = {"r": self.plan_size, "i": self.cells, "j": self.cells}
        of_regions = super().forward(vectors[:, -(self.plan_size**2) :])
        return rearrange(of_regions, "b (r c) (i j d) -> b (r i c j) d", **sizes)


class RowRegionConditioning(nn.Linear):
    """Projects the last vectors of a caption to a vector for each token of a row.

    Args:
        plan_size: regions a side.
        row_length: tokens of the row.
        dim: width of a caption's vectors and of a token's vector.

    Attributes:
        shares: logits (row_length, plan_size**2) of the weight of each region for each token.
    """

    def __init__(self, plan_size: int, row_length: int, dim: int):
        super().__init__(dim, dim, bias=False)
        self.shares = nn.Parameter(torch.zeros(row_length, plan_size**2))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, row_length, dim) of the tokens.

        Args:
            vectors: (B, n, dim), of which the last `plan_size**2` are those of the regions in raster order.
        """
        return self.shares.softmax(dim=1) @ super().forward(vectors[:, -self.shares.shape[1] :])


def build_region_conditioning(
    plan_size: int, grid_size: int | None, row_length: int | None, dim: int
) -> RegionConditioning | RowRegionConditioning:
    """The layer for tokens of a grid of `grid_size` cells a side, or of a row of `row_length`."""
    if grid_size is not None:
        return RegionConditioning(plan_size, grid_size, dim)
    assert row_length is not None, "check_layout lets only a grid or a row pass"
    return RowRegionConditioning(plan_size, row_length, dim)


def region_conditioning_layers(model: nn.Module) -> list[nn.Module]:
    """The region conditioning layer of a model, as a list; empty for a model without one."""
    return [layer for name, layer in model.named_children() if name == "plan_embeddings"]
