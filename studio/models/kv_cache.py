"""A preallocated key/value cache that attention reads only up to its current length.

Keys and values of every layer stand in one tensor of shape (rows, kv_heads, max_length, head_dim). A step writes behind the
last position and reads `[:length]`, so early tokens cost less than late ones and nothing is concatenated.
"""

import torch

from studio.errors import StudioError


class KVCache:
    """Keys and values of all layers for a fixed number of rows.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model.
        rows: sequences decoded together (twice the images when guided: conditional rows first, null rows after).
        max_length: positions that may ever be stored (prefix + image tokens).

    Errors: `StudioError` when more positions are written than fit, or rows or positions are kept that are not there.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (rows, num_kv_heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.max_length = max_length
        self.length = 0

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (rows, kv_heads, n, head_dim) behind the current length; returns views of everything stored so far.

        The length itself moves once per step, by `advance`, after the last layer.
        """
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise StudioError(f"The key/value cache holds {self.max_length} positions; {end} were asked for.")
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, positions: int) -> None:
        """Counts `positions` new positions as stored."""
        self.length += positions

    def crop(self, length: int) -> None:
        """Forgets everything behind the first `length` positions."""
        if not 0 <= length <= self.length:
            raise StudioError(f"The cache holds {self.length} positions and cannot be cropped to {length}.")
        self.length = length

    def keep_rows(self, rows: int) -> None:
        """Keeps the first `rows` rows; later steps run on those only. No copy is made."""
        if not 0 < rows <= self.rows:
            raise StudioError(f"The cache has {self.rows} rows and cannot keep {rows}.")
        self.keys = [keys[:rows] for keys in self.keys]
        self.values = [values[:rows] for values in self.values]
