"""Fewer tokens inside the vision tower: hooks in which the methods `tome` and `diffrate` take their steps.

Before a layer some tokens go into others. Attention counts a token as often as there are patches in it, by the
logarithm of its size beside the logits (ToMe, arXiv:2210.09461, section 3, "proportional attention"). Behind the tower
each patch gets the state of its token, so that projector, newlines and pruners see the grid that they expect, and
scores of patches are those of their tokens.

Tokens go before a layer, not in its middle, so that hooks are enough and stock models of transformers stay as they are.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from studio.checks import check_integer, shown
from studio.errors import StudioError
from studio.pruning.blocks import with_keywords

Counts = int | Sequence[int]
"""Tokens before the second layer, the third, ...; one number is that of each of these layers."""
Stepped = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, their sizes, and the new place of each token that there was."""


def merging_from(asked: Counts | str) -> dict[str, Any]:
    """The arguments of `studio.merge_tokens` that a short form says.

    Args:
        asked: numbers of merged tokens, for ToMe, also as text: "56,28,14"; "diffrate", with what was learned for the
            model; "diffrate:36+10,28+8", with these numbers of merged and of pruned tokens; "diffrate:56,28" prunes
            none.

    Raises:
        StudioError: a text of another form.
    """
    if not isinstance(asked, str):
        return {"merged": asked}
    if asked == "diffrate":
        return {"method": asked}
    numbers = asked.removeprefix("diffrate:").split(",")
    if not all(_STEP.fullmatch(each) for each in numbers) or ("+" in asked and not asked.startswith("diffrate:")):
        raise StudioError(f"Tokens are merged as by 56,28,14 or diffrate or diffrate:36+10,28+8, not {shown(asked)}.")
    counts = [tuple(map(int, f"{each}+0".split("+")[:2])) for each in numbers]
    merged, pruned = ([count[way] for count in counts] for way in (0, 1))
    both = {"merged": merged[0] if len(merged) == 1 else merged, "pruned": pruned[0] if len(pruned) == 1 else pruned}
    return {"method": "diffrate", **both} if asked.startswith("diffrate:") else {"merged": both["merged"]}


@dataclass(frozen=True)
class TowerTokens:
    """The tokens of one call of a tower, those of all crops together and CLS not counted.

    Args:
        patches: as many as there were before any step.
        tokens: those that the features come from, before each patch gets the state of its token.
    """

    patches: int
    tokens: int


@dataclass
class MergeRecord:
    """What `studio.merge_tokens` yields, of the latest call of the tower; `None` before the first.

    Args:
        latest: how many tokens.
        places: the token of each patch, from 0 up in each crop, (crops, patches) int64; `None` where none went.
    """

    latest: TowerTokens | None = None
    places: torch.Tensor | None = None


@dataclass(eq=False)
class _Run:
    """One call of the tower.

    Args:
        merging: whose.
        sizes: patches in each token, (B, n); None before the first step.
        slots: the token of each patch, (B, N); None before the first step.
        seen: the projections of the latest layer that the method reads, (B, n, C); queries of CLS alone.
        passed: the slots with which each layer ran.
    """

    merging: "Merging"
    sizes: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    passed: list[torch.Tensor | None] = field(default_factory=list)


_STEP = re.compile(r"\s*\d{1,8}(\+\d{1,8})?\s*", re.ASCII)
"""What goes before one layer, as text."""
_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)
_OPEN: ContextVar[tuple["Merging", ...]] = ContextVar("merging", default=())


def expanded(rows: torch.Tensor, attention: torch.nn.Module) -> torch.Tensor:
    """A row for each patch, from the rows (B, n, C) of a projection in an attention whose tokens may be merged."""
    run = _RUN.get()
    merged = run is not None and any(layer.self_attn is attention for layer in run.merging.layers)
    return _for_patches(rows, run.slots) if run is not None and merged else rows


def rows_at(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens of x (B, n, C) at places (B, k): whole rows, which is faster than `gather`."""
    among_all = places + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, among_all.flatten()).view(*places.shape, x.shape[2])


def without(
    x: torch.Tensor, sizes: torch.Tensor, source: torch.Tensor, target: torch.Tensor, merged: int | None = None
) -> Stepped:
    """The tokens without some, of which all or the first `merged` count in others: means weighted by size.

    Args:
        x: tokens (B, n, C).
        sizes: patches in each, (B, n), floating-point.
        source: places (B, k) of the tokens that go.
        target: places (B, k) of tokens that stay, which stand for them.

    Returns:
        Tokens (B, n - k, C) in their order, their sizes, and the new place (B, n) of each token that there was.
    """
    stays = torch.ones_like(sizes, dtype=torch.long).scatter(1, source, 0)
    kept = stays.argsort(dim=1, descending=True, stable=True)[:, : x.shape[1] - source.shape[1]]
    slots = stays.cumsum(dim=1) - 1
    target = slots.gather(1, target)
    places = slots.scatter(1, source, target)
    source, target = source[:, :merged], target[:, :merged]
    added, counts = sizes.gather(1, source), sizes.gather(1, kept)
    rows, more = rows_at(x, kept) * counts[..., None], rows_at(x, source) * added[..., None]
    rows = rows.scatter_add(1, target[..., None].expand_as(more), more)
    counts = counts.scatter_add(1, target, added)
    return rows / counts[..., None], counts, places


def _for_patches(rows: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    if slots is None:
        return rows
    if rows.stride(1) == 0:  # one row for all, as of layers that are not computed
        return rows[:, :1].expand(-1, slots.shape[1], -1)
    return rows_at(rows, slots)


class Merging(ABC):
    """Hooks on a CLIP or SigLIP tower in whose context tokens go, by the steps of a method.

    Args:
        tower: the vision model.
        numbers: of tokens that go, several where tokens go in several ways.
        has_cls: whether token 0 is CLS.

    Raises:
        StudioError: more tokens than there are, more numbers than layers, or flash attention, which takes no sizes.
    """

    reads: tuple[str, ...] = ("k_proj",)
    """The projections that a step gets."""

    def __init__(self, tower: Any, *numbers: Counts, has_cls: bool):
        self.tower, self.has_cls, self.record = tower, has_cls, MergeRecord()
        self.layers = [part for part in tower.modules() if hasattr(getattr(part, "self_attn", None), "k_proj")]
        self.counts = list(zip(*map(self._of_each_layer, numbers)))
        tokens = (tower.config.image_size // tower.config.patch_size) ** 2 + has_cls
        for counts in self.counts:
            if sum(counts) > (most := self.most(tokens)):
                raise StudioError(
                    f"Tokens of the tower: {tokens} can lose {most} before this layer, not {sum(counts)}."
                )
            tokens -= sum(counts)
        if "flash" in (tower.config._attn_implementation or ""):
            raise StudioError("Merged tokens need sdpa or eager attention: flash attention takes no sizes of tokens.")

    def _of_each_layer(self, numbers: Counts) -> list[int]:
        after = len(self.layers) - 1
        counts = list(numbers) if isinstance(numbers, Sequence) else [numbers] * after
        if len(counts) > after:
            raise StudioError(f"Tokens go before the second to the last of {after + 1} layers: give {after} numbers.")
        counts = [check_integer("The number of tokens that go", count, 0) for count in counts]
        return counts + [0] * (after - len(counts))

    @abstractmethod
    def most(self, tokens: int) -> int:
        """How many of so many tokens, CLS included, can go in one step."""

    @abstractmethod
    def step(
        self, x: torch.Tensor, sizes: torch.Tensor, counts: tuple[int, ...], attention: Any, **seen: torch.Tensor
    ) -> Stepped:
        """Take tokens away.

        Args:
            x: tokens (B, n, C).
            sizes: patches in each token, (B, n), floating-point.
            counts: of tokens that go, one for each of `numbers`; some is above 0.
            attention: of the layer before.
            seen: the projections `reads` in it, (B, n, C); of queries only that of CLS where there is one.

        Returns:
            Tokens (B, n - sum(counts), C), their sizes, and the new place (B, n) of each token that there was.
        """

    @contextmanager
    def hooks(self, feature_layer: int = -1) -> Iterator[MergeRecord]:
        """The hooks, in a block.

        Args:
            feature_layer: index into the tower's hidden states that the features come from.
        """
        self.last_read = max(feature_layer % (len(self.layers) + 1) - 1, 0)  # the layer whose output they are
        with ExitStack() as handles:
            for number, layer in enumerate(self.layers):
                for name in self.reads:
                    hook = getattr(layer.self_attn, name).register_forward_hook(self._keep(name))
                    handles.callback(hook.remove)
                enter = layer.register_forward_pre_hook(with_keywords(self._enter(number), 2), with_kwargs=True)
                handles.callback(enter.remove)
            handles.callback(self.tower.register_forward_pre_hook(self._begin).remove)
            handles.callback(self.tower.register_forward_hook(self._end).remove)
            _OPEN.set((*_OPEN.get(), self))
            handles.callback(lambda: _OPEN.set(tuple(other for other in _OPEN.get() if other is not self)))
            yield self.record

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
        cls = int(self.has_cls)
        crops, patches = output.last_hidden_state.shape[0], output.last_hidden_state.shape[1] - cls
        tokens = patches - sum(map(sum, self.counts[: self.last_read]))
        places = run.passed[self.last_read]
        self.record.latest = TowerTokens(crops * patches, crops * tokens)
        self.record.places = None if places is None else places[:, cls:] - cls
        return output

    def _current(self) -> _Run | None:
        run = _RUN.get()
        return run if run is not None and run.merging is self else None

    def _keep(self, name):
        only_first = self.has_cls and name == "q_proj"

        def hook(projection, arguments, output):
            if run := self._current():
                run.seen[name] = output[:, :1] if only_first else output

        return hook

    def _enter(self, number):
        counts = self.counts[number - 1] if number else (0,)

        def hook(layer, arguments, keywords):
            run = self._current()
            if run is None:
                return None
            x = arguments[0] if arguments else keywords["hidden_states"]
            if any(counts):
                sizes = x.new_ones(x.shape[:2]) if run.sizes is None else run.sizes
                before = self.layers[number - 1].self_attn
                x, run.sizes, places = self.step(x, sizes, counts, before, **run.seen)
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
