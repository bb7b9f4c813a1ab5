"""A key/value cache for trees of tokens: what is stored last is pending until some of it is kept, row by row.

New positions go behind the longest row of all, so that a step stores one block and attention reads views; a shorter row
does not see the gap. `keep` then moves each row's accepted positions to its own end, and forgets the rest.
"""

from collections.abc import Sequence

import torch

from studio.errors import StudioError
from studio.models.kv_cache import KVCache


class TreeCache(KVCache):
    """Arguments and errors as of `KVCache`.

    `lengths` counts each row's kept positions; those stored behind `base`, the longest row, are pending.
    """

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.base = 0
        self.lengths = [0] * self.rows

    @property
    def row_lengths(self) -> torch.Tensor:
        """`lengths` (rows,) int64, on the cache's device."""
        return torch.tensor(self.lengths, device=self.store.device)

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

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keeps these pending positions of each row, which rise; forgets the others.

        Errors: `StudioError` when a number names no pending position.
        """
        pending = self.length - self.base
        rows, sources, targets = [], [], []
        for row, (length, positions) in enumerate(zip(self.lengths, kept, strict=True)):
            for target, position in enumerate(positions, length):
                if not 0 <= position < pending:
                    raise StudioError(f"The cache holds {pending} pending positions; keep some of those.")
                if self.base + position != target:
                    rows.append(row)
                    sources.append(self.base + position)
                    targets.append(target)
        if rows:
            rows, sources, targets = torch.tensor((rows, sources, targets), device=self.store.device)
            by_position = self.store.permute(1, 4, 0, 2, 3, 5)
            by_position[rows, targets] = by_position[rows, sources]
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
        """Goes on with these rows only, in this order."""
        chosen = torch.tensor(rows, device=self.store.device)
        self.store = self.store[:, chosen]
        if self.bias is not None:
            self.bias = self.bias[chosen]
        if self.plan is not None:
            self.plan = self.plan[chosen]
        self._set_lengths([self.lengths[row] for row in rows])

    def keep_rows(self, rows: int) -> None:
        super().keep_rows(rows)
        self._set_lengths(self.lengths[:rows])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.base = self.length = max(lengths)
