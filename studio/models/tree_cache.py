"""A key/value cache for trees of tokens: what is stored last is pending until some of it is kept, row by row.

New positions go behind the longest row of all, so that a step stores one block and attention reads views; a shorter row
does not see the gap. `keep` then moves each row's accepted positions to its own end, and forgets the rest.
"""

import torch

from studio.errors import StudioError
from studio.models.kv_cache import KVCache


class TreeCache(KVCache):
    """Arguments and errors as of `KVCache`.

    `row_lengths` (rows,) int64 counts each row's kept positions; those stored behind `base`, the longest row, are
    pending.
    """

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.base = 0
        self.row_lengths = torch.zeros(self.rows, dtype=torch.long, device=self.store.device)

    def kept(self) -> tuple[int, torch.Tensor]:
        return self.base, self.row_lengths

    def tree_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Additive mask (rows, 1, n, length + n) for n positions about to be stored.

        `visible` (rows, n, pending + n) bool says which pending and new positions each of them sees. It sees the kept
        positions of its row that are no padding, and always itself.
        """
        rows, new, _ = visible.shape
        kept = torch.arange(self.base, device=visible.device) < self.row_lengths[:, None]
        seen = torch.cat((kept[:, None].expand(rows, new, self.base), visible), dim=2)
        if self.bias is not None:
            seen = seen & (self.bias[:, 0, :, : seen.shape[2]] == 0)
        seen[:, :, self.length :].diagonal(dim1=1, dim2=2).fill_(True)
        like = self.store
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))[:, None]

    def keep(self, nodes: torch.Tensor, counts: torch.Tensor) -> None:
        """Keeps the first `counts` (rows,) of the pending positions `nodes` (rows, m), which rise; forgets the others.

        Errors: `StudioError` when a number names no pending position.
        """
        pending, most = self.length - self.base, nodes.shape[1]
        rising = torch.arange(most, device=nodes.device)
        named = rising < counts[:, None]
        if counts.max() > most or ((nodes < 0) | (nodes >= pending))[named].any():
            raise StudioError(f"The cache holds {pending} pending positions; keep some of those.")
        source, target = self.base + nodes, self.row_lengths[:, None] + rising
        rows, places = torch.nonzero(named & (source != target), as_tuple=True)
        if len(rows):
            source, target = source[rows, places], target[rows, places]
            by_position = self.store.permute(1, 4, 0, 2, 3, 5)
            by_position[rows, target] = by_position[rows, source]
        self.row_lengths = self.row_lengths + counts
        self.base = self.length = int(self.row_lengths.max())

    def keep_all(self) -> None:
        """Keeps all pending positions in every row, one after the other."""
        pending = torch.arange(self.length - self.base, device=self.row_lengths.device)
        self.keep(pending.expand(self.rows, -1), torch.full_like(self.row_lengths, len(pending)))

    def forget(self) -> None:
        """Forgets all pending positions."""
        self.length = self.base

    def crop_rows(self, lengths: torch.Tensor) -> None:
        """Forgets what is pending, and in each row what is behind the first `lengths` (rows,) positions."""
        self.row_lengths = torch.minimum(self.row_lengths, lengths)
        self.base = self.length = int(self.row_lengths.max())

    def select_rows(self, rows: torch.Tensor) -> None:
        """Goes on with these rows (m,) only, in this order."""
        self.store = self.store[:, rows]
        self.row_lengths = self.row_lengths[rows]
        if self.bias is not None:
            self.bias = self.bias[rows]
        self.crop_rows(self.row_lengths)

    def keep_rows(self, rows: int) -> None:
        super().keep_rows(rows)
        self.row_lengths = self.row_lengths[:rows]
        self.crop_rows(self.row_lengths)
