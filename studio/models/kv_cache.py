"""A preallocated key/value cache that attention reads only up to its current length.

One tensor, `store`, of shape (layers, rows, 2, kv_heads, max_length, head_dim): keys, then values. A step writes behind
the last position and reads `[:length]`, so early tokens cost less than late ones and nothing is concatenated.
"""

import torch

from studio.errors import StudioError


class KVCache:
    """Keys and values of all layers for a fixed number of rows.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model.
        rows: sequences decoded together (twice the images when guided: conditional rows first, null rows after).
        max_length: positions that may ever be stored (prefix + image tokens).

    `bias` (rows, 1, 1, max_length), when set by `mask_prefix`, is 0 or -inf for every later query. `plan` (rows,
    positions, dim), when set by the model, is added to the inputs of the positions.

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
        shape = (num_layers, rows, 2, num_kv_heads, max_length, head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0
        self.bias: torch.Tensor | None = None
        self.plan: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.store.shape[1]

    def mask_prefix(self, valid: torch.Tensor) -> None:
        """Hides the prefix positions where `valid` (rows, prefix) is false from every later query."""
        bias = torch.zeros(self.rows, 1, 1, self.max_length, dtype=self.store.dtype, device=valid.device)
        bias[:, 0, 0, : valid.shape[1]].masked_fill_(~valid, float("-inf"))
        self.bias = bias

    def attention_mask(self, new: int) -> torch.Tensor | None:
        """Additive mask for `new` positions about to be stored: broadcasts to (rows, 1, new, length + new), or None."""
        end = self.length + new
        bias = None if self.bias is None else self.bias[..., :end]
        if new == 1:
            return bias
        like = self.store
        causal = torch.full((new, end), float("-inf"), dtype=like.dtype, device=like.device).triu(self.length + 1)
        return causal if bias is None else causal + bias

    def with_plan(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Inputs x (rows, n, dim) of positions (rows, n), by default of the next ones, with the plan for them."""
        if self.plan is None:
            return x
        if positions is None:
            return x + self.plan[:, self.length : self.length + x.shape[1]]
        return x + self.plan.gather(1, positions[..., None].expand_as(x))

    def update(self, layer: int, keys_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (rows, 2, kv_heads, n, head_dim) behind the current length; returns views of all keys and all values.

        The length itself moves once per step, by `advance`, after the last layer.
        """
        new = keys_values.shape[3]
        self.check_room(new)
        stored = self.store[layer, :, :, :, : self.length + new]
        stored[:, :, :, self.length :] = keys_values
        keys, values = stored.unbind(1)
        return keys, values

    def check_room(self, new: int) -> None:
        """Raises a `StudioError` when `new` positions do not fit any more."""
        if self.length + new > self.max_length:
            raise StudioError(
                f"The key/value cache holds {self.max_length} positions; {self.length + new} were asked for."
            )

    def kept(self) -> tuple[int, torch.Tensor]:
        """Positions of the longest row that later queries see, and of each row (rows,) int64."""
        return self.length, torch.full((self.rows,), self.length, device=self.store.device)

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
        self.store = self.store[:, :rows]
        if self.bias is not None:
            self.bias = self.bias[:rows]
        if self.plan is not None:
            self.plan = self.plan[:rows]
