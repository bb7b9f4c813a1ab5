"""Merging of tokens inside the vision tower: "Token Merging: Your ViT But Faster" (ToMe, arXiv:2210.09461).

Before a layer, the tokens at even places look for the token at an odd place whose key, of the layer before, resembles
theirs most; the pairs that are most alike become one token, their mean weighted by size. Attention counts a token as
often as there are patches in it, by the logarithm of its size beside the logits (section 3, "proportional attention").
No training is needed.

Behind the tower each patch gets the state of its token, so that projector, newlines and pruners see the grid that they
expect, and scores of patches are those of their tokens.

Deviations from the paper: tokens are merged before a layer, not in its middle, so that hooks are enough and stock
models of transformers stay as they are (each merge costs one feed-forward layer more); the number of merged tokens may
differ from layer to layer; order is kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from studio.checks import check_integer
from studio.errors import StudioError
from studio.pruning.blocks import with_keywords


@dataclass(eq=False)
class _Run:
    """One call of the tower.

    Args:
        merging: whose.
        sizes: patches in each token, (B, n).
        slots: the token of each patch, (B, N); None before the first merge.
        keys: of the latest layer, (B, n, C).
        passed: the slots with which each layer ran.
    """

    merging: "Merging"
    sizes: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    passed: list[torch.Tensor | None] = field(default_factory=list)


_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)
_OPEN: ContextVar[tuple["Merging", ...]] = ContextVar("merging", default=())


def merge(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor, count: int, first: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the `count` tokens at even places that resemble one at an odd place most into that one.

    Args:
        x: tokens (B, n, C).
        keys: (B, n, D), by whose cosine tokens are compared.
        sizes: patches in each token, (B, n), floating-point.
        count: from 1 to the number of even places.
        first: the first even place: 0, or 2 behind a CLS token, which never moves.

    Returns:
        Tokens (B, n - count, C) in their order, their sizes, and the new place (B, n) of each token that there was.
    """
    rows, n, _ = x.shape
    directions = F.normalize(keys.float(), dim=-1)
    alike, nearest = (directions[:, first::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=2)
    chosen = alike.topk(count, dim=1).indices
    source, target = first + 2 * chosen, 1 + 2 * nearest.gather(1, chosen)
    weighted = x * sizes[..., None]
    weighted = weighted.scatter_add(1, target[..., None].expand(-1, -1, x.shape[2]), _rows(weighted, source))
    sizes = sizes.scatter_add(1, target, sizes.gather(1, source))
    stays = torch.ones_like(sizes, dtype=torch.long).scatter_(1, source, 0)
    kept = stays.argsort(dim=1, descending=True, stable=True)[:, : n - count]
    places = torch.arange(n, device=x.device).expand(rows, -1).scatter(1, source, target)
    sizes = sizes.gather(1, kept)
    return _rows(weighted, kept) / sizes[..., None], sizes, (stays.cumsum(dim=1) - 1).gather(1, places)


def expanded(rows: torch.Tensor, attention: torch.nn.Module) -> torch.Tensor:
    """A row for each patch, from the rows (B, n, C) of a projection in an attention whose tokens may be merged."""
    run = _RUN.get()
    merged = run is not None and any(layer.self_attn is attention for layer in run.merging.layers)
    return _for_patches(rows, run.slots) if run is not None and merged else rows


def _for_patches(rows: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    return rows if slots is None else _rows(rows, slots)


def _rows(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens of x (B, n, C) at places (B, k): whole rows, which is faster than `gather`."""
    among_all = places + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, among_all.flatten()).view(*places.shape, -1)


class Merging:
    """Hooks on a CLIP or SigLIP tower that merge tokens in the context that opened them.

    Args:
        tower: the vision model.
        merged: tokens merged away before the second, third, ... layer; a number stands for all of these layers.
        has_cls: whether token 0 is CLS.

    Raises:
        StudioError: more tokens than there are, more numbers than layers, or flash attention, which takes no sizes.
    """

    def __init__(self, tower: Any, merged: int | Sequence[int], has_cls: bool):
        self.tower, self.first = tower, 2 if has_cls else 0
        self.layers = [part for part in tower.modules() if hasattr(getattr(part, "self_attn", None), "k_proj")]
        after = len(self.layers) - 1
        counts = list(merged) if isinstance(merged, Sequence) else [merged] * after
        if len(counts) > after:
            raise StudioError(f"Tokens are merged before the second to the last of {after + 1} layers: give {after}.")
        self.counts = [check_integer("The number of merged tokens", count, 0) for count in counts]
        self.counts += [0] * (after - len(counts))
        tokens = (tower.config.image_size // tower.config.patch_size) ** 2 + has_cls
        for count in self.counts:
            if count > (most := len(range(self.first, tokens, 2))):
                raise StudioError(f"{tokens} tokens of the tower can lose {most} before this layer, not {count}.")
            tokens -= count
        if "flash" in (tower.config._attn_implementation or ""):
            raise StudioError("Merged tokens need sdpa or eager attention: flash attention takes no sizes of tokens.")

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as handles:
            for number, layer in enumerate(self.layers):
                keys = layer.self_attn.k_proj.register_forward_hook(self._keep_keys)
                enter = layer.register_forward_pre_hook(with_keywords(self._enter(number), 2), with_kwargs=True)
                handles.callback(keys.remove)
                handles.callback(enter.remove)
            handles.callback(self.tower.register_forward_pre_hook(self._begin).remove)
            handles.callback(self.tower.register_forward_hook(self._end).remove)
            _OPEN.set((*_OPEN.get(), self))
            handles.callback(lambda: _OPEN.set(tuple(other for other in _OPEN.get() if other is not self)))
            yield

    def _begin(self, tower, arguments):
        if self in _OPEN.get():
            _RUN.set(_Run(self))

    def _end(self, tower, arguments, output):
        run = self._current()
        if run is None:
            return None
        _RUN.set(None)
        if output.hidden_states is not None:
            slots = (None, *run.passed)  # the first states are those before any layer
            output.hidden_states = tuple(
                None if states is None else _for_patches(states, of_layer)
                for states, of_layer in zip(output.hidden_states, slots, strict=True)
            )
        output.last_hidden_state = _for_patches(output.last_hidden_state, run.slots)
        return output

    def _current(self) -> _Run | None:
        run = _RUN.get()
        return run if run is not None and run.merging is self else None

    def _keep_keys(self, projection, arguments, output):
        if run := self._current():
            run.keys = output

    def _enter(self, number):
        count = self.counts[number - 1] if number else 0

        def hook(layer, arguments, keywords):
            run = self._current()
            if run is None:
                return None
            x = arguments[0] if arguments else keywords["hidden_states"]
            if count:
                assert run.keys is not None
                heads = run.keys.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(dim=2)
                sizes = x.new_ones(x.shape[:2]) if run.sizes is None else run.sizes
                x, run.sizes, places = merge(x, heads, sizes, count, self.first)
                run.slots = places if run.slots is None else places.gather(1, run.slots)
            run.passed.append(run.slots)
            if run.sizes is None:
                return None
            bias = run.sizes.log()[:, None, None]
            others = {
                name: value for name, value in keywords.items() if name not in ("hidden_states", "attention_mask")
            }
            return (x, bias, *arguments[2:]), others

        return hook
