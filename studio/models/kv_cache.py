"""Preallocated key/value caches: `KVCache` for sequences, `TreeCache` for trees of tokens.

A `KVCache` is one tensor, `store`, of shape (layers, rows, 2, kv_heads, max_length, head_dim): keys, then values. A
step writes behind the last position and attention reads `[:length]`, so early tokens cost less than late ones and
nothing is concatenated.

In a `TreeCache` the last positions are pending until some of them are kept, row by row. New positions go behind the
longest row, so that a step stores one block and attention reads views; a shorter row does not see the gap. `keep` then
moves the accepted positions of each row to the row's end and forgets the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from studio.errors import StudioError


class KVCache:
    """Keys and values of all layers for a fixed number of rows.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model.
        rows: sequences decoded together (with guidance twice the images: conditional rows first, then unconditional).
        max_length: positions that may ever be stored (prefix + image tokens).

    Attributes:
        length: positions stored.
        bias: (rows, 1, 1, max_length), 0 or -inf for every later query; set by `mask_prefix`.
        region_conditioning: (rows, positions, dim), added to the inputs of the positions; set by the model.

    Raises:
        StudioError: more positions are written than fit, or rows or positions are kept that are not there.
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
        self.region_conditioning: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences in the cache."""
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

    def add_region_conditioning(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Inputs x (rows, n, dim) plus the region conditioning of their positions (rows, n); None: the next n."""
        if self.region_conditioning is None:
            return x
        if positions is None:
            return x + self.region_conditioning[:, self.length : self.length + x.shape[1]]
        return x + self.region_conditioning.gather(1, positions[..., None].expand_as(x))

    def update(self, layer: int, keys_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (rows, 2, kv_heads, n, head_dim) behind the current length; returns views of all keys and all values.

        The length itself moves once per step, by `advance`, after the last layer.
        """
        new = keys_values.shape[3]
        self.check_capacity(new)
        stored = self.store[layer, :, :, :, : self.length + new]
        stored[:, :, :, self.length :] = keys_values
        keys, values = stored.unbind(1)
        return keys, values

    def check_capacity(self, new: int) -> None:
        """Raises a `StudioError` when `new` positions do not fit any more."""
        if self.length + new > self.max_length:
            raise StudioError(
                f"The key/value cache holds {self.max_length} positions; {self.length + new} were asked for."
            )

    def kept(self) -> tuple[int, list[int]]:
        """Number of positions that later queries see: of the longest row, and of each row."""
        return self.length, [self.length] * self.rows

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
        if self.region_conditioning is not None:
            self.region_conditioning = self.region_conditioning[:rows]


class TreeCache(KVCache):
    """A cache for trees of tokens; arguments and errors as of `KVCache`.

    Attributes:
        lengths: kept positions of each row.
        base: kept positions of the longest row; positions stored behind it are pending.
    """

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self.base = 0
        self.lengths = [0] * self.rows

    @property
    def row_lengths(self) -> torch.Tensor:
        """`lengths` (rows,) int64, on the cache's device."""
        return torch.tensor(self.lengths, device=self.store.device)

    def kept(self) -> tuple[int, list[int]]:
        """As `KVCache.kept`; pending positions do not count."""
        return self.base, self.lengths

    def tree_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Additive mask (rows, 1, n, length + n) for n positions about to be stored.

        Args:
            visible: (rows, n, pending + n) bool, the pending and new positions that each of them sees. It also sees the
                kept positions of its row that are not padding, and always itself.
        """
        rows, new, _ = visible.shape
        kept = torch.arange(self.base, device=visible.device) < self.row_lengths[:, None]
        seen = torch.cat((kept[:, None].expand(rows, new, self.base), visible), dim=2)
        if self.bias is not None:
            seen = seen & (self.bias[:, 0, :, : seen.shape[2]] == 0)
        seen[:, :, self.length :].diagonal(dim1=1, dim2=2).fill_(True)
        like = self.store
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))[:, None]

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keeps some pending positions of each row and forgets the others.

        Args:
            kept: for each row, the numbers of its pending positions to keep, from 0, in increasing order.

        Raises:
            StudioError: a number names no pending position.
        """
        pending = self.length - self.base
        rows: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        for row, (length, positions) in enumerate(zip(self.lengths, kept, strict=True)):
            for end, position in enumerate(positions, length):
                if not 0 <= position < pending:
                    raise StudioError(f"The cache holds {pending} pending positions; keep some of those.")
                if self.base + position != end:
                    rows.append(row)
                    sources.append(self.base + position)
                    targets.append(end)
        if rows:
            row, source, target = torch.tensor((rows, sources, targets), device=self.store.device)
            by_position = self.store.permute(1, 4, 0, 2, 3, 5)
            by_position[row, target] = by_position[row, source]
        self._set_lengths([length + len(positions) for length, positions in zip(self.lengths, kept)])

    def keep_all(self) -> None:
        """Keeps all pending positions in every row, one after the other."""
        self.keep([range(self.length - self.base)] * self.rows)

    def forget(self) -> None:
        """Forgets all pending positions."""
        self.length = self.base

    def crop_rows(self, lengths: Sequence[int]) -> None:
        """Forgets what is pending, and in each row what is behind the first `lengths` (rows,) positions."""
        self._set_lengths([min(pair) for pair in zip(self.lengths, lengths, strict=True)])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Continues with these rows only, in this order."""
        chosen = torch.tensor(rows, device=self.store.device)
        self.store = self.store[:, chosen]
        if self.bias is not None:
            self.bias = self.bias[chosen]
        if self.region_conditioning is not None:
            self.region_conditioning = self.region_conditioning[chosen]
        self._set_lengths([self.lengths[row] for row in rows])

    def absorb_rows(self, other: "TreeCache", order: Sequence[int]) -> None:
        """Continues with the rows of this cache and those of another of the same sizes behind them, in this order."""
        self.store = torch.cat((self.store, other.store), dim=1)
        self.bias = _appended(self.bias, other.bias)
        self.region_conditioning = _appended(self.region_conditioning, other.region_conditioning)
        self.lengths = self.lengths + other.lengths
        self.select_rows(order)

    def drop_rows(self, rows: Sequence[int]) -> list[int]:
        """Continues without some rows; returns which row each of the others was."""
        gone = set(rows)
        stay = [row for row in range(self.rows) if row not in gone]
        self.select_rows(stay)
        return stay

    def keep_rows(self, rows: int) -> None:
        """As `KVCache.keep_rows`; pending positions are forgotten."""
        super().keep_rows(rows)
        self._set_lengths(self.lengths[:rows])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.base = self.length = max(lengths, default=0)


class BatchCache(TreeCache):
    """A `TreeCache` that rows join and leave; it begins without any.

    Each row stays where it is until it leaves, except for the last one, which then takes its place.

    Args:
        sizes: as of `KVCache`; `rows` is the most that fit.
    """

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self._whole = self.store
        self.store = self._whole[:, :0]
        self._set_lengths([])

    def join(self, other: KVCache) -> None:
        """Appends the rows of a cache with the same sizes, whose positions are all kept and fit.

        Raises:
            StudioError: there is no place for them.
        """
        start, length = self.rows, other.length
        end = start + other.rows
        if end > self._whole.shape[1]:
            raise StudioError(f"The cache holds {self._whole.shape[1]} rows; {end} were asked for.")
        self._whole[:, start:end, :, :, :length] = other.store[:, :, :, :, :length]
        self._whole[:, start:end, :, :, length:] = 0  # what is hidden must be finite, too
        self.store = self._whole[:, :end]
        bias = None if other.bias is None else F.pad(other.bias, (0, self.max_length - other.max_length))
        self.bias = _appended(self.bias, bias)
        self.region_conditioning = _appended(self.region_conditioning, other.region_conditioning)
        self._set_lengths([*self.lengths, *[length] * other.rows])

    def reserve(self, pending: int, length: int) -> None:
        """Makes space for `pending` positions behind `length` kept ones, where there is less."""
        more = length + pending - self.max_length
        if more > 0:
            rows, self.max_length = self.rows, self.max_length + more
            self._whole = F.pad(self._whole, (0, 0, 0, more))
            self.store = self._whole[:, :rows]
            self.bias = None if self.bias is None else F.pad(self.bias, (0, more))

    def drop_rows(self, rows: Sequence[int]) -> list[int]:
        """As `TreeCache.drop_rows`; last rows take the places of others."""
        order = list(range(self.rows))
        for row in sorted(rows, reverse=True):
            self.leave(row)
            order[row] = order[-1]
            order.pop()
        return order

    def leave(self, row: int) -> None:
        """Forgets a row and all pending positions; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            self._whole[:, row, :, :, :length] = self._whole[:, last, :, :, :length]
            for tensor in (self.bias, self.region_conditioning):
                if tensor is not None:
                    tensor[row] = tensor[last]
            self.lengths[row] = length
        self.store = self._whole[:, :last]
        self.bias = None if self.bias is None else self.bias[:last]
        self.region_conditioning = None if self.region_conditioning is None else self.region_conditioning[:last]
        self._set_lengths(self.lengths[:last])


def _appended(own: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """The rows of both, one behind the other; None where the model has none."""
    if new is None:
        return None
    return new.clone() if own is None else torch.cat((own, new))
