"""Columns of a prompt: which of them a layer holds, what its cache holds of them, and the masks that go with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from studio.errors import StudioError


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

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask among these columns, from what the model gives its layers: 4-D, (B, L) or `None`, causal."""
        if mask is None:
            if self.real.all():
                return None
            causal = torch.ones(2 * self.real.shape[1:], dtype=torch.bool, device=self.real.device).tril()
            return causal & self.real[:, None, None]
        if mask.dim() == 2:
            return mask.gather(1, self.order) & self.real.to(mask.dtype)
        mask = mask.expand(len(self.real), -1, -1, -1)
        mask = mask.gather(2, self.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, self.order[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        return hidden_where(~self.real[:, None, None], mask)


def hidden_where(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A mask that hides more: bool, true where seen, or added to the logits."""
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


class ShortLayer(DynamicLayer):
    """A layer that stands for a prompt of `prompt` tokens and holds n of them, per head perhaps others.

    Args:
        keys, values: (B, heads, n, D).
        real: (B, n) bool, false where a row holds fewer than n.
        prompt: how many tokens the layer has seen.
        bias: (B, query heads, n), added to the logits: log of how many keys each one stands for; `None` where all stand
            for themselves.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        real: torch.Tensor,
        prompt: int,
        bias: torch.Tensor | None = None,
    ):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.real, self.prompt, self.seen = keys, values, real, prompt, prompt
        self.bias = bias

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *arguments, **keywords)

    def get_seq_length(self) -> int:
        return self.seen

    def mask(self, mask: torch.Tensor | None, queries: int) -> torch.Tensor | None:
        """The mask of new queries over this layer, from that over all tokens: (B, 1, Q, seen), (B, seen) or `None`."""
        if mask is None:
            if self.bias is None and self.real.all():
                return None
            new = torch.ones(queries, self.seen - self.prompt + queries, dtype=torch.bool, device=self.real.device)
            mask = new.tril(self.seen - self.prompt)[None, None]
        else:
            mask = mask[..., self.prompt :]
        if mask.dim() == 2:
            return torch.cat((self.real.to(mask.dtype), mask), dim=1)
        mask = mask.expand(len(self.real), -1, -1, -1)
        seen = torch.ones_like if mask.dtype == torch.bool else torch.zeros_like
        before = seen(mask[..., :1]).expand(-1, -1, -1, self.real.shape[1])
        mask = torch.cat((hidden_where(~self.real[:, None, None], before), mask), dim=-1)
        return mask if self.bias is None else self._biased(mask)

    def _biased(self, mask: torch.Tensor) -> torch.Tensor:
        """(B, query heads, Q, n + new), added to the logits."""
        assert self.bias is not None and self.keys is not None
        bias = F.pad(self.bias, (0, mask.shape[-1] - self.bias.shape[-1]))[:, :, None].to(self.keys.dtype)
        if mask.dtype == torch.bool:
            return bias.expand(-1, -1, mask.shape[2], -1).masked_fill(~mask, torch.finfo(bias.dtype).min)
        return (bias + mask).clamp(min=torch.finfo(mask.dtype).min)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda rows: rows[indices])

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.real = change(self.real)
        if self.bias is not None:
            self.bias = change(self.bias)

    def crop(self, tokens_to_remove: int) -> None:
        if self.seen - abs(tokens_to_remove) < self.prompt:
            raise StudioError(
                f"A cache that was cut cannot lose tokens of its prompt: remove at most {self.seen - self.prompt}."
            )
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)
