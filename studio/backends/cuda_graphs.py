"""LlamaGen and its student with static shapes, replayed as CUDA graphs.

On a GPU the step of a small model takes as long as it takes to start its kernels. Here the calls for so many positions
of so many sequences have the same shapes and the same memory every time: attention reads the whole cache under a mask,
and the place to write to is a number on the device. So the kernels of a call are recorded once and then started
together. Nothing waits for the device.

Elsewhere the same code runs without graphs, which is how it is tested. Weights are read where they are; a backend is
made anew when they move.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from studio.backends.model_backend import ModelBackend
from studio.models.distilled import DistilledStudent
from studio.models.kv_cache import KVCache, TreeCache
from studio.models.llamagen import LlamaGen

_EAGER_CALLS = 2
_FREE_SLOTS, _STUDENT_CALLS = 4, 8
logger = logging.getLogger(__name__)


class Replay:
    """A function of tensors whose kernels are recorded at its third call on a GPU, and replayed from then on.

    Args:
        function: from tensors of the same shapes at each call to tensors; it must not look at their values.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: tuple[torch.Tensor, ...] = ()

    def __call__(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results, which stay as they are at the next call."""
        self._calls += 1
        if given[0].device.type != "cuda" or self._calls <= _EAGER_CALLS:
            return self._function(*given)
        if self._calls == _EAGER_CALLS + 1:
            self._record(given)
        if self._graph is None:
            return self._function(*given)
        for kept, new in zip(self._inputs, given, strict=True):
            kept.copy_(new)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)

    def _record(self, given: tuple[torch.Tensor, ...]) -> None:
        self._inputs, graph = [each.clone() for each in given], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self._function(*self._inputs)
        except RuntimeError as error:
            logger.warning("This call runs without a CUDA graph (%s).", str(error).strip().splitlines()[0])
            return
        self._graph = graph


class _Slot:
    """The memory of a cache, and the calls that were recorded for it."""

    def __init__(self, store: torch.Tensor) -> None:
        self.store = store
        self.replays: dict[tuple, Replay] = {}


class _StaticCache(KVCache):
    """A `KVCache` in the memory of a slot."""

    def __init__(self, slot: _Slot, **sizes: Any):
        super().__init__(**{**sizes, "device": "meta"})
        self.slot, self.store = slot, slot.store


class _StaticTreeCache(TreeCache):
    """A `TreeCache` in the memory of a slot."""

    def __init__(self, slot: _Slot, **sizes: Any):
        super().__init__(**{**sizes, "device": "meta"})
        self.slot, self.store = slot, slot.store

    def select_rows(self, rows: Any) -> None:
        """As `TreeCache.select_rows`; the rows are copied to the front."""
        super().select_rows(rows)
        chosen, self.store = self.store, self.slot.store[:, : len(rows)]
        self.store.copy_(chosen)


class _Writer:
    """The `update` of a cache at places (n,) that are on the device."""

    def __init__(self, store: torch.Tensor, places: torch.Tensor) -> None:
        self._store, self._places = store, places

    def update(self, layer: int, keys_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Stores (rows, 2, kv_heads, n, head_dim); returns all keys and all values, of places to come too."""
        stored = self._store[layer].index_copy_(3, self._places, keys_values)
        return stored.unbind(1)


class GraphedLlamaGen(ModelBackend[LlamaGen]):
    """The cached-decoding calls of `LlamaGen`, for single tokens, several, and trees; results differ by rounding only.

    Memory of caches that are not used any more is used again, with the calls that were recorded for it.
    """

    def __init__(self, model: LlamaGen):
        super().__init__(model)
        self._free: list[tuple[tuple, _Slot]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def new_cache(self, rows: int) -> KVCache:
        """As `LlamaGen.new_cache`."""
        return self._new(_StaticCache, self.model._cache_sizes(rows))

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """As `LlamaGen.new_tree_cache`."""
        sizes = self.model._cache_sizes(rows)
        return self._new(_StaticTreeCache, {**sizes, "max_length": sizes["max_length"] + pending})

    def _new(self, kind: type, sizes: dict[str, Any]) -> Any:
        key = (kind, sizes["rows"], sizes["max_length"])
        found = next((each for each in self._free if each[0] == key), None)
        if found is not None:
            self._free.remove(found)
        slot = _Slot(KVCache(**sizes).store) if found is None else found[1]
        slot.store.zero_()
        cache = kind(slot, **sizes)
        weakref.finalize(cache, self._release, key, slot).atexit = False
        return cache

    def _release(self, key: tuple, slot: _Slot) -> None:
        self._free.append((key, slot))
        del self._free[:-_FREE_SLOTS]

    def extend(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.extend`."""
        rows, n = tokens.shape
        cache.check_capacity(n)
        places = torch.arange(cache.length, cache.length + n, device=tokens.device)
        ahead = torch.arange(cache.max_length, device=tokens.device) > places[:, None]
        mask = torch.zeros(rows, 1, n, cache.max_length, dtype=cache.store.dtype, device=tokens.device)
        mask = mask.masked_fill_(ahead, float("-inf"))
        if cache.bias is not None:
            mask = mask + cache.bias
        x = cache.add_region_conditioning(self.model.tok_embeddings(tokens))
        return self._run(x, places.expand(rows, n), mask, cache, logits=True)

    def extend_tree(
        self, tokens: torch.Tensor, cache: TreeCache, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """As `LlamaGen.extend_tree`."""
        cache.check_capacity(tokens.shape[1])
        seen = cache.tree_mask(visible)
        mask = F.pad(seen, (0, cache.max_length - seen.shape[3]), value=float("-inf"))
        x = cache.add_region_conditioning(self.model.tok_embeddings(tokens), positions)
        return self._run(x, positions, mask, cache, logits=False)

    def _run(
        self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any, logits: bool
    ) -> torch.Tensor:
        """States or logits of x (rows, n, dim), stored behind what the cache holds."""
        rows, n, _ = x.shape
        places = torch.arange(cache.length, cache.length + n, device=x.device)
        slot = vars(cache).get("slot")
        if slot is None or slot.store.data_ptr() != cache.store.data_ptr():
            slot = cache.slot = _Slot(cache.store)
        key, replays = (rows, n, logits), slot.replays
        if key not in replays:
            replays[key] = Replay(self._call(cache.store, logits))
        [result] = replays[key](x, positions, mask, places)
        cache.advance(n)
        return result

    def _call(self, store: torch.Tensor, logits: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
        def call(x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> tuple:
            model, writer = self.model, _Writer(store, places)
            rope = model.rope()[positions]
            for index, layer in enumerate(model.layers):
                x = layer(x, rope, mask, writer, index)
            states = model.norm(x)
            return (model.logits(states) if logits else states,)

        return call


class GraphedStudent(ModelBackend[DistilledStudent]):
    """The calls of a `DistilledStudent`; a call for so many positions of so many images is recorded."""

    def __init__(self, student: DistilledStudent):
        super().__init__(student)
        self._replays: dict[tuple, Replay] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden_states(
        self, vectors: torch.Tensor, known: int | torch.Tensor, **condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DistilledStudent.hidden_states`."""
        if not isinstance(known, torch.Tensor):
            known = torch.full((1,), known, device=vectors.device)
        names, tensors = tuple(condition), (vectors, known.to(vectors.device), *condition.values())
        key = (names, tuple((tensor.shape, tensor.dtype) for tensor in tensors))

        def call(vectors: torch.Tensor, known: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.model.hidden_states(vectors, known, **dict(zip(names, values, strict=True)))

        replay = self._replays.pop(key, None) or Replay(call)
        self._replays[key] = replay  # the one that was used last is the last
        for oldest in list(self._replays)[:-_STUDENT_CALLS]:
            del self._replays[oldest]
        hidden, context = replay(*tensors)
        return hidden, context
