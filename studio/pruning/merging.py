"""Fewer tokens inside the vision tower: hooks in which the methods `tome` and `diffrate` take their steps.

In a layer, between attention and feed-forward, some tokens go into others. Attention counts a token as often as there
are patches in it, by the logarithm of its size beside the logits (ToMe, arXiv:2210.09461, section 3, "proportional
attention"). Behind the tower each patch gets the state of its token, so that newlines and pruners see the grid that
they expect, and scores of patches are those of their tokens. The projector, which maps each state by itself, maps each
token once.

Stock models of transformers stay as they are: a hook gives the second half of a layer fewer tokens, zero stands in for
what it adds to all, and the sum of fewer tokens becomes the output of the layer. Layers behind the one that the
features come from lose none.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from studio.checks import check_integer, shown
from studio.errors import StudioError
from studio.pruning.blocks import with_keywords

Counts = int | Sequence[int]
"""Tokens that go in the first layer, the second, ...; one number is that of each layer up to the features."""
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
        halfway: the tokens that are left in the middle of a layer, (B, n, C), and then what feed-forward adds to them.
        passed: the slots of the output of each layer.
    """

    merging: "Merging"
    sizes: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    halfway: list[torch.Tensor] = field(default_factory=list)
    passed: list[torch.Tensor | None] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Features:
    """What a tower's run leaves for the projector.

    Args:
        tokens: states (B, n, C) that the features come from.
        slots: the token of each patch, (B, N).
        states: `tokens`, a row for each patch (B, N, C).
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    states: torch.Tensor

    def are(self, x: torch.Tensor) -> bool:
        """Whether x (B, N or N - 1, C) is a part of `states`, and not another tensor of this shape."""
        return x.untyped_storage().data_ptr() == self.states.untyped_storage().data_ptr()


_STEP = re.compile(r"\s*\d{1,8}(\+\d{1,8})?\s*", re.ASCII)
"""What goes in one layer, as text."""
_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)
_FEATURES: ContextVar[_Features | None] = ContextVar("features", default=None)
_PROJECTED: ContextVar[torch.Tensor | None] = ContextVar("projected", default=None)
"""The token of each patch that the projector is about to map."""
_OPEN: ContextVar[tuple["Merging", ...]] = ContextVar("merging", default=())


def expanded(rows: torch.Tensor, attention: torch.nn.Module) -> torch.Tensor:
    """A row for each patch, from the rows (B, n, C) of a projection in an attention whose tokens may be merged."""
    run = _RUN.get()
    merged = run is not None and run.merging.acts() and attention in run.merging.attentions
    return _for_patches(rows, run.slots) if run is not None and merged else rows


def mean_of_heads(keys: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys (B, n, D) of several heads as their mean, (B, n, D / heads), by which tokens are compared."""
    return keys.unflatten(-1, (heads, -1)).mean(dim=2)


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
    weights = x.new_zeros(*kept.shape, source.shape[1]).scatter(1, target[:, None], added[:, None].to(x.dtype))
    # A product: on a CPU many times as fast as `scatter_add`, on a GPU the same sum each time.
    rows = torch.baddbmm(rows_at(x, kept) * counts[..., None], weights, rows_at(x, source))
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
        feature_layer: index into the tower's hidden states that the features come from.

    Raises:
        StudioError: more tokens than there are, more numbers than layers, or flash attention, which takes no sizes.
    """

    reads: tuple[str, ...] = ("k_proj",)
    """The projections that a step gets."""

    def __init__(self, tower: Any, *numbers: Counts, has_cls: bool, feature_layer: int = -1):
        self.tower, self.has_cls, self.record, self.is_open = tower, has_cls, MergeRecord(), False
        layers = [part for part in tower.modules() if hasattr(getattr(part, "self_attn", None), "k_proj")]
        self.read = feature_layer % (len(layers) + 1)
        self.layers, self.behind = layers[: self.read], layers[self.read :]
        self.attentions = {layer.self_attn for layer in layers}
        self.counts = list(zip(*map(self._of_each_layer, numbers)))
        tokens = (tower.config.image_size // tower.config.patch_size) ** 2 + has_cls
        for counts in self.counts:
            if sum(counts) > (most := self.most(tokens)):
                raise StudioError(f"Tokens of the tower: {tokens} can lose {most} in this layer, not {sum(counts)}.")
            tokens -= sum(counts)
        if "flash" in (tower.config._attn_implementation or ""):
            raise StudioError("Merged tokens need sdpa or eager attention: flash attention takes no sizes of tokens.")

    def _of_each_layer(self, numbers: Counts) -> list[int]:
        layers = len(self.layers)
        counts = list(numbers) if isinstance(numbers, Sequence) else [numbers] * layers
        if len(counts) > layers:
            raise StudioError(
                f"Tokens go in the first {layers} layers of the tower, which are read: give {layers} numbers."
            )
        counts = [check_integer("The number of tokens that go", count, 0) for count in counts]
        return counts + [0] * (layers - len(counts))

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
            attention: of the layer.
            seen: the projections `reads` in it, (B, n, C); of queries only that of CLS where there is one.

        Returns:
            Tokens (B, n - sum(counts), C), their sizes, and the new place (B, n) of each token that there was.
        """

    @contextmanager
    def hooks(self, projector: torch.nn.Module | None = None) -> Iterator[MergeRecord]:
        """The hooks, in a block. Of nested blocks on one tower the innermost counts.

        Args:
            projector: what maps each state of the features by itself; without it, whatever does so maps a row for each
                patch.
        """
        with ExitStack() as handles:

            def hook(module: torch.nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
                if before is not None:
                    handles.callback(module.register_forward_pre_hook(before).remove)
                if after is not None:
                    handles.callback(module.register_forward_hook(after, prepend=True).remove)

            for layer in (*self.layers, *self.behind):
                enter = layer.register_forward_pre_hook(with_keywords(self._sizes_in_attention, 2), with_kwargs=True)
                handles.callback(enter.remove)
            for layer, counts in zip(self.layers, self.counts, strict=True):
                if any(counts):
                    for name in self.reads:
                        hook(getattr(layer.self_attn, name), after=self._keep(name))
                    hook(layer.layer_norm2, before=self._halfway(layer.self_attn, counts))
                    hook(layer.mlp, after=self._zero)
                hook(layer, after=self._sum)
            hook(self.tower, self._begin, self._end)
            if projector is not None:
                hook(projector, self._tokens_alone, self._projected)
            _OPEN.set((*_OPEN.get(), self))
            self.is_open = True
            handles.callback(self._close)
            yield self.record

    def _close(self) -> None:
        """Leaves nothing behind, also of a run that an exception ended."""
        self.is_open = False
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not self))
        for left in (_RUN, _FEATURES, _PROJECTED):
            left.set(None)

    def acts(self) -> bool:
        """Whether this is the innermost open block on its tower in this context."""
        return next((one for one in reversed(_OPEN.get()) if one.is_open and one.tower is self.tower), None) is self

    def _begin(self, tower, arguments):
        if not self.acts():
            return
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in (*self.layers, *self.behind))
        if checkpointing and tower.training and torch.is_grad_enabled():
            raise StudioError("Tokens merge once in each layer: turn gradient checkpointing of the vision tower off.")
        _RUN.set(_Run(self))

    def _end(self, tower, arguments, output):
        run = self._current()
        if run is None:
            return None
        _RUN.set(None)
        if output.hidden_states is not None:
            slots = (None, *run.passed, *[run.slots] * len(self.behind))  # the first states are before any layer
            tokens = output.hidden_states[self.read]
            if tokens is None and run.slots is not None:
                raise StudioError(
                    "Tokens merge up to the layer that the configuration takes features from: leave out "
                    "vision_feature_layer, or set it in the configuration."
                )
            output.hidden_states = tuple(
                None if states is None else _for_patches(states, of_layer)
                for states, of_layer in zip(output.hidden_states, slots, strict=True)
            )
            if run.slots is not None:
                _FEATURES.set(_Features(tokens, run.slots, output.hidden_states[self.read]))
        output.last_hidden_state = _for_patches(output.last_hidden_state, run.slots)
        cls = int(self.has_cls)
        crops, patches = output.last_hidden_state.shape[0], output.last_hidden_state.shape[1] - cls
        tokens = patches - sum(map(sum, self.counts))
        places = run.slots
        self.record.latest = TowerTokens(crops * patches, crops * tokens)
        self.record.places = None if places is None else places[:, cls:] - cls
        return output

    def _tokens_alone(self, projector, arguments):
        """The projector reads tokens in place of patches, where it reads what the tower has just left."""
        if not self.acts():
            return None
        features, cls = _FEATURES.get(), int(self.has_cls)
        _FEATURES.set(None)
        _PROJECTED.set(None)
        if features is None or not features.are(arguments[0]) or arguments[0].shape[1] != features.slots.shape[1] - cls:
            return None
        _PROJECTED.set(features.slots[:, cls:] - cls)
        return (features.tokens[:, cls:], *arguments[1:])

    def _projected(self, projector, arguments, output):
        slots = _PROJECTED.get()
        if not self.acts() or slots is None:
            return None
        _PROJECTED.set(None)
        return rows_at(output, slots)

    def _current(self) -> _Run | None:
        run = _RUN.get()
        return run if run is not None and run.merging is self and self.acts() else None

    def _keep(self, name):
        only_first = self.has_cls and name == "q_proj"

        def hook(projection, arguments, output):
            if run := self._current():
                run.seen[name] = output[:, :1] if only_first else output

        return hook

    def _halfway(self, attention, counts):
        def hook(norm, arguments):
            run = self._current()
            if run is None:
                return None
            [x] = arguments
            sizes = x.new_ones(x.shape[:2]) if run.sizes is None else run.sizes
            x, run.sizes, places = self.step(x, sizes, counts, attention, **run.seen)
            run.slots = places if run.slots is None else places.gather(1, run.slots)
            run.halfway = [x]
            return (x,)

        return hook

    def _zero(self, mlp, arguments, output):
        if (run := self._current()) is None:
            return None
        run.halfway.append(output)
        return output.new_zeros(1, 1, 1)

    def _sum(self, layer, arguments, output):
        if (run := self._current()) is None:
            return None
        run.passed.append(run.slots)
        if not run.halfway:
            return None
        x, more = run.halfway
        run.halfway = []
        return x + more

    def _sizes_in_attention(self, layer, arguments, keywords):
        run = self._current()
        if run is None or run.sizes is None:
            return None
        x = arguments[0] if arguments else keywords["hidden_states"]
        bias = run.sizes.log()[:, None, None]
        others = {name: value for name, value in keywords.items() if name not in ("hidden_states", "attention_mask")}
        return (x, bias, *arguments[2:]), others
