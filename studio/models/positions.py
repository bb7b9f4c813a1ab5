"""Rotary positions of image tokens behind a prefix, in a grid or in a row (arXiv:2104.09864)."""

import torch

from studio.errors import StudioError


def check_layout(grid_size: int | None, row_length: int | None) -> None:
    """Raises a `StudioError` unless image tokens are either a grid or a row."""
    if (grid_size is None) == (row_length is None) or (row_length is not None and row_length < 1):
        raise StudioError(
            "Image tokens are a grid or a row: give grid_size, or row_length of at least 1 and grid_size=None; got "
            f"grid_size {grid_size!r} and row_length {row_length!r}."
        )


def rope_table(
    grid_size: int | None,
    head_dim: int,
    prefix_length: int,
    base: float,
    prefix_rope: str,
    row_length: int | None = None,
) -> torch.Tensor:
    """Rotation (cos, sin) for every position: (prefix_length + image tokens, head_dim // 2, 2), float32.

    An image token in cell (row, column) of a grid turns the first half of its pairs by row and the second half by
    column; one in a row of `row_length` turns all pairs by its place (arXiv:2104.09864). Prefix positions get
    cos = sin = 0 ("zero": their queries and keys vanish, as in the released weights) or no rotation ("identity").

    Errors: `StudioError` without a grid and without a row.
    """
    half = head_dim // 2
    if row_length is not None:
        frequencies = 1.0 / (base ** (torch.arange(half).float() / half))
        image = torch.outer(torch.arange(row_length).float(), frequencies)
    elif grid_size is not None:
        frequencies = 1.0 / (base ** (torch.arange(0, half, 2)[: half // 2].float() / half))
        angles = torch.outer(torch.arange(grid_size).float(), frequencies)
        rows = angles[:, None, :].expand(grid_size, grid_size, -1)
        columns = angles[None, :, :].expand(grid_size, grid_size, -1)
        image = torch.cat((rows, columns), dim=-1).reshape(grid_size * grid_size, half)
    else:
        raise StudioError("Positions are turned by their place in a grid or a row: give grid_size or row_length.")
    prefix = torch.zeros(prefix_length, half, 2)
    if prefix_rope == "identity":
        prefix[..., 0] = 1.0
    return torch.cat((prefix, torch.stack((image.cos(), image.sin()), dim=-1)))


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the interleaved pairs of x (rows, n, heads, head_dim) by the table (n, head_dim // 2, 2), in float32.

    A table (rows, n, head_dim // 2, 2) turns each row by its own.
    """
    cos, sin = table[..., None, :, 0], table[..., None, :, 1]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).type_as(x)
