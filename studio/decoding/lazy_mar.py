"""LazyMAR: most calls of a masked transformer recompute only what changes, and one stream of guidance.

"LazyMAR: Accelerating Masked Autoregressive Models via Feature Caching" (arXiv:2503.12450), and the authors' code.
Every k-th call, and the first few, are full. In the others

- the encoder reads the buffer and the tokens of the call before; older tokens keep their keys, values and states,
- the decoder runs to the attention of one early block on all places; behind it only the places sampled now or just
  before remain, and those whose values moved most; the others keep their keys and values,
- the unconditional stream does not run: its state is the conditional one plus their difference at the last full call.

A full call is plain bit by bit. Deviations: the number of places that remain is the authors' table over 64 calls, read
in proportion; they choose in the fourth block of 12 to 20, a shallower decoder does so after a quarter, at the earliest
in the second, since the first block's values know nothing of other places;
a call that samples more than an eighth of the tokens, or follows an edit of known tokens, is full; the cache of their
diffusion head is left out, as a step of the compiled head is one call.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from studio.models.masked_autoencoder import Block, MaskedAutoencoder, take_rows

if TYPE_CHECKING:
    from studio.decoding.mar import Step

REFRESH_EVERY, WARM_STEPS = 9, 5
_SCORED_BLOCK = 3
_EXTRA = 15
_KEPT = ((20, 1.0), (21, 0.6), (25, 0.5), (30, 0.4), (35, 0.15), (40, 0.12), (64, 0.05))
"""Of 64 calls: before which one what share of the places remains."""


def full_calls(plan: Sequence["Step"], total: int, every: int, warm: int) -> list[bool]:
    """Which calls of a plan over `total` tokens are full: the first `warm`, then every `every`-th, and wide ones."""
    wide = (step.last - step.first > total / 8 for step in plan)
    return [number < warm or (number - warm) % every == 0 or is_wide for number, is_wide in enumerate(wide)]


def kept_share(number: int, count: int) -> float:
    """The share of the places that remain behind the scored block, at a call of `count`."""
    at = number * 64 // count
    return next(share for end, share in _KEPT if at < end)


class _KeysValues(NamedTuple):
    """Of one block, (B, heads, n, d) each."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(self, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrites those at places (B, k)."""
        for kept, new in zip(self, (keys, values)):
            kept.scatter_(2, places[:, None, :, None].expand_as(new), new)


class LazyMAR:
    """The transformer of B images, called once for each step of a plan.

    Args:
        model: in evaluation mode.
        buffer: (S*B, n, dim), of the condition, and with S = 2 the unconditional one behind it.
        order: of the positions (B, L).
        plan: the steps.
        every, warm: as of `full_calls`.
        steps: those of a whole image, where the plan has only its last ones.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        buffer: torch.Tensor,
        order: torch.Tensor,
        plan: Sequence["Step"],
        every: int = REFRESH_EVERY,
        warm: int = WARM_STEPS,
        steps: int | None = None,
    ) -> None:
        self.model, self.buffer, self.order, self.plan = model, buffer, order, plan
        self.images, self.before = len(order), model.config.buffer_size
        self.full = full_calls(plan, model.num_tokens, every, warm)
        self.number, self.steps = 0, steps or len(plan)
        depth = len(model.decoder_blocks)
        self.scored = min(_SCORED_BLOCK, max(1, depth // 4), depth - 1)

    @property
    def next_rows(self) -> int:
        """Sequences that the next call reads."""
        return len(self.buffer) if self.full[self.number] else self.images

    def forget(self) -> None:
        """Makes the next call, if there is one, a full one: known tokens have changed."""
        if self.number < len(self.full):
            self.full[self.number] = True

    def conditions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Conditions (S, B, k, decoder_dim) of the tokens of the next step, from tokens (B, L, D)."""
        step = self.plan[self.number]
        x = self._refresh(tokens, step) if self.full[self.number] else self._reuse(tokens, step)
        self.number += 1
        wanted = self._sampled_in(step)
        return torch.stack([self.model.head_conditions(stream, wanted) for stream in x])

    def _refresh(self, tokens: torch.Tensor, step: "Step") -> torch.Tensor:
        """The last block's output (S, B, k, dim), and everything that later calls reuse."""
        model, streams = self.model, len(self.buffer) // self.images
        positions = (self.order[:, step.last :], self._sampled_in(step), self._sampled_soon())
        visible, wanted, soon = (part.repeat(streams, 1) for part in positions)
        x = model.encoder_input(tokens.repeat(streams, 1, 1), visible, self.buffer)
        self.encoder: list[Any] = []
        self.decoder: list[Any] = []
        for block in model.encoder_blocks:
            x = self._kept(block, x, self.encoder)
        states = model.encoder_norm(x)
        placed = model.decoder_input(states, visible)
        self.placed = placed[: self.images].clone()
        x = model.with_regions(placed, states)
        for block in model.decoder_blocks[:-1]:
            x = self._kept(block, x, self.decoder)
        last = model.decoder_blocks[-1]
        normed = last.norm1(x)
        places = self.before + wanted
        queries, keys, values = last.attn.project(normed, take_rows(normed, places))
        self._keep(self.decoder, keys, values)
        found = last.finish(take_rows(x, places), last.attn.attend(queries, keys, values))
        if streams == 2 and soon.shape[1]:
            places = self.before + soon
            queries = last.attn.queries(take_rows(normed, places))
            ahead = last.finish(take_rows(x, places), last.attn.attend(queries, keys, values))
            conditional, unconditional = ahead.chunk(2)
            self.difference = unconditional.new_zeros(self.images, model.num_tokens, ahead.shape[-1])
            at = places[: self.images, :, None].expand_as(conditional) - self.before
            self.difference.scatter_(1, at, unconditional - conditional)
        return found.unflatten(0, (streams, -1))

    def _kept(self, block: Block, x: torch.Tensor, kept: list[_KeysValues]) -> torch.Tensor:
        """A block over all of x, which appends its keys and values to a list."""
        queries, keys, values = block.attn.project(block.norm1(x))
        self._keep(kept, keys, values)
        return block.finish(x, block.attn.attend(queries, keys, values))

    def _keep(self, kept: list[_KeysValues], keys: torch.Tensor, values: torch.Tensor) -> None:
        kept.append(_KeysValues(keys[: self.images].clone(), values[: self.images].clone()))

    def _reuse(self, tokens: torch.Tensor, step: "Step") -> torch.Tensor:
        """The last block's output (S, B, k, dim), from what has changed since the last call."""
        model, new = self.model, self._sampled_in(self.plan[self.number - 1])
        x = model.encoder_input(tokens, new, self.buffer[: self.images])
        for index, block in enumerate(model.encoder_blocks):
            x = self._appended(block, x, index)
        states, places = model.encoder_norm(x), model.places_of(new)
        embedded = model.decoder_embed(states) + model.decoder_pos_embed_learned[0][places]
        self.placed.scatter_(1, places[:, :, None].expand_as(embedded), embedded)
        wanted = self._sampled_in(step)
        x = self._decode(model.with_regions(self.placed, states), self.before + wanted, self.before + new)
        if len(self.buffer) == self.images:
            return x[None]
        return torch.stack((x, x + take_rows(self.difference, wanted)))

    def _appended(self, block: Block, x: torch.Tensor, index: int) -> torch.Tensor:
        """A block of the encoder over the buffer and the new tokens, of which it keeps keys and values."""
        queries, *fresh = block.attn.project(block.norm1(x))
        before = self.before
        kept = _KeysValues(
            *(torch.cat((new[:, :, :before], old[:, :, before:], new[:, :, before:]), dim=2)
              for old, new in zip(self.encoder[index], fresh))
        )  # fmt: skip
        self.encoder[index] = kept
        return block.finish(x, block.attn.attend(queries, *kept))

    def _decode(self, x: torch.Tensor, wanted: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The last block's output (B, k, dim) at places `wanted` (B, k), from x (B, P, dim); `new` (B, v) just came."""
        blocks, sampled = self.model.decoder_blocks, wanted.shape[1]
        for index, block in enumerate(blocks):
            normed, kept = block.norm1(x), self.decoder[index]
            if index <= self.scored:
                keys, values = block.attn.keys_values(normed)
                if index == self.scored:
                    places = self._moved_most(kept.values, values, wanted, new)
                    normed, x = take_rows(normed, places), take_rows(x, places)
                kept = self.decoder[index] = _KeysValues(keys, values)
                queries = block.attn.queries(normed)
            else:
                queries, keys, values = block.attn.project(normed)
                kept.write(places, keys, values)
            if block is blocks[-1]:
                queries, x = queries[:, :, :sampled], x[:, :sampled]
            x = block.finish(x, block.attn.attend(queries, *kept))
        return x

    def _moved_most(
        self, before: torch.Tensor, now: torch.Tensor, wanted: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        """Places (B, m) to go on with: those wanted, those new, and those whose values moved most."""
        named = torch.cat((wanted, new), dim=1)
        total = now.shape[2]
        share = kept_share(self.number + self.steps - len(self.plan), self.steps)
        count = min(total, max(named.shape[1] + _EXTRA, math.floor(total * share)))
        alike = F.cosine_similarity(now, before, dim=-1).mean(dim=1).scatter(1, named, math.inf)
        rest = alike.topk(count - named.shape[1], largest=False).indices
        return torch.cat((named, rest), dim=1)

    def _sampled_in(self, step: "Step") -> torch.Tensor:
        return self.order[:, step.first : step.last]

    def _sampled_soon(self) -> torch.Tensor:
        """Positions (B, k) that calls before the next full one sample."""
        later = list(self._calls_of_reuse())
        first, last = (later[-1].first, later[0].last) if later else (0, 0)
        return self.order[:, first:last]

    def _calls_of_reuse(self) -> Iterator["Step"]:
        for step, is_full in zip(self.plan[self.number + 1 :], self.full[self.number + 1 :]):
            if is_full:
                return
            yield step
