"""Layers of a KV cache that hold fewer tokens than the prompt had, and the masks and positions that go with them.

Transformers makes one mask for all layers, as wide as the longest; each layer takes its own columns of it.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, eq=False)
class Columns:
    """Which of the prompt's L columns a layer holds.

    Args:
        order: (B, n) long, columns in ascending order; rows that keep fewer than n begin with others.
        real: (B, n) bool, false for those others.
    """

    order: torch.Tensor
    real: torch.Tensor

    @classmethod
    def where(cls, keep: torch.Tensor) -> "Columns":
        """The columns that `keep` (B, L) marks."""
        order = torch.argsort(keep.int(), dim=1, stable=True)[:, -int(keep.sum(dim=1).max()) :]
        return cls(order, keep.gather(1, order))

    def among(self, earlier: "Columns") -> "Columns":
        """These columns of columns that were taken `earlier`, in terms of the prompt."""
        return Columns(earlier.order.gather(1, self.order), self.real & earlier.real.gather(1, self.order))

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows (B, n, D) of hidden states, or of a rotary table, (B or 1, L, D)."""
        hidden = hidden.expand(len(self.order), -1, -1)
        return hidden.gather(1, self.order[..., None].expand(-1, -1, hidden.shape[-1]))

    def mask(self, mask: torch.Tensor | None, new: int, queries: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of a layer from that of the whole prompt.

        Args:
            mask: what the model gives its layers: (B, 1, Q, L + new), (B, L + new) or `None`, causal.
            new: how many columns follow the prompt's.
            queries: (B, n) columns whose queries stay; `None` for queries of new tokens, all of them.
        """
        after = torch.ones_like(self.real[:, :1]).expand(-1, new)
        real = torch.cat((self.real, after), dim=1)
        if mask is None:
            if real.all():
                return None
            rows = real.shape[1] if queries is not None else new
            causal = torch.ones(rows, real.shape[1], dtype=torch.bool, device=real.device)
            return causal.tril(real.shape[1] - rows) & real[:, None, None]
        prompt = mask.shape[-1] - new
        columns = torch.cat((self.order, (prompt + torch.arange(new, device=real.device)).expand(len(real), -1)), dim=1)
        if mask.dim() == 2:
            return mask.gather(1, columns) & real.to(mask.dtype)
        mask = mask.expand(len(real), -1, -1, -1)
        if queries is not None:
            mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        if mask.dtype == torch.bool:
            return mask & real[:, None, None]
        return mask.masked_fill(~real[:, None, None], torch.finfo(mask.dtype).min)


class ShortLayer(DynamicLayer):
    """A layer that stands for a prompt of `seen` tokens and holds those of `columns`.

    Args:
        keys, values: (B, heads, n, D) of the columns.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, columns: Columns, seen: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.columns, self.prompt, self.seen = keys, values, columns, seen, seen

    def update(self, key_states, value_states, *arguments, **keywords):
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *arguments, **keywords)

    def get_seq_length(self) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take_rows(torch.arange(len(self.columns.order)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(indices)

    def _take_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.columns.order.device)
        self.columns = Columns(self.columns.order[rows], self.columns.real[rows])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)
