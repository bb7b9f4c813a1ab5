"""LlamaGen and its drafter in C for CPUs, compiled from `native.c` on first use.

On a CPU the time of a step is the time to read the weights. Weights that are exact in bfloat16, as those of every
bundled model, are stored and read as bfloat16: half the bytes and the same results, bit by bit. The result at a
position depends neither on how many positions or rows are computed with it nor on what else is pending in the cache: a
tree of tokens gets, bit by bit, the states that its paths get one token at a time.

Half of a drafter's input layer, the product with the token embeddings, is computed in advance as a table.

Without a compiler `is_available` is false, and `studio.backends.packed` is the next best.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from studio.backends.model_backend import ModelBackend
from studio.backends.native_library import library, loaded_library
from studio.errors import StudioError
from studio.models.distilled import DistilledStudent
from studio.models.drafter import Drafter
from studio.models.kv_cache import KVCache, TreeCache
from studio.models.llamagen import LlamaGen

_LANES, _QUERIES = 8, 4


class _Network(ctypes.Structure):
    """The struct `Network` of native.c; a list has an entry per layer."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [(name, ctypes.c_int32) for name in ("dim", "heads", "kv_heads", "head_dim", "hidden", "layers", "bf16")]
        + [("positions", ctypes.c_int32), ("eps", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("wqkv", "wo", "w1", "w3", "w2")]
        + [(name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "norm", "rope")]
    )


class _Call(ctypes.Structure):
    """The struct `Call` of native.c."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [(name, ctypes.c_int32) for name in ("rows", "nodes", "base", "pending", "max_length", "threads")]
        + [(name, ctypes.c_int64) for name in ("cache_layer", "cache_row", "bias_row")]
        + [(name, ctypes.c_void_p) for name in ("cache", "kept", "positions", "visible", "bias")]
    )


def can_run(model: LlamaGen | Drafter | DistilledStudent, *sizes: int) -> bool:
    """Whether a model's blocks, and more products of these `sizes`, run in C on this machine.

    This needs float32 weights on a CPU, sizes that are multiples of 8, and a working compiler.
    """
    block: Any = model.layers[0]
    sizes = (*sizes, model.config.dim, block.attention.head_dim, block.feed_forward.w1.out_features)
    fits = not any(size % _LANES for size in sizes)
    return model.device.type == "cpu" and model.dtype == torch.float32 and fits and library() is not None


def are_bfloat16(*weights: torch.Tensor) -> bool:
    """Whether all numbers are exact in bfloat16."""
    return all(torch.equal(weight.bfloat16().float(), weight) for weight in weights)


def pack(weight: torch.Tensor, bf16: bool) -> torch.Tensor:
    """A matrix (out, in) in the layout of native.c: (ceil(out / block), in, block), bfloat16 or float32.

    A block is two of the widest vectors. In bfloat16 the low and high parts of 32-bit words are its first and its
    second vector.
    """
    lanes = loaded_library().studio_lanes()
    rows, columns = weight.shape
    blocks = -(-rows // (2 * lanes))
    filled = torch.zeros(blocks * 2 * lanes, columns)
    filled[:rows] = weight.detach()
    packed = filled.view(blocks, 2, lanes, columns)
    packed = packed.permute(0, 3, 2, 1) if bf16 else packed.permute(0, 3, 1, 2)
    return packed.to(torch.bfloat16 if bf16 else torch.float32).contiguous().view(blocks, columns, 2 * lanes)


class NativeProduct:
    """x W^T for a matrix (out, in) and x (..., in) of float32; sizes are multiples of eight."""

    def __init__(self, weight: torch.Tensor):
        self.out, self.inputs = weight.shape
        self.bf16 = are_bfloat16(weight)
        self.weight = pack(weight, self.bf16)
        self._run = loaded_library().studio_product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out)
        rows = x.numel() // self.inputs
        self._run(
            self.weight.data_ptr(), self.inputs, self.out, self.bf16, torch.get_num_threads(), rows, x.data_ptr(),
            y.data_ptr(),
        )  # fmt: skip
        return y


class NativeBlocks:
    """A packed copy of a model's blocks and of the norm behind them.

    Args:
        model: a `LlamaGen`, `Drafter` or `DistilledStudent` for which `can_run` is true.
        norm: the weight (dim,) of the norm behind the blocks, or None.
    """

    @torch.no_grad()
    def __init__(self, model: LlamaGen | Drafter | DistilledStudent, norm: torch.Tensor | None):
        layers: Any = model.layers
        self._run = loaded_library().studio_blocks
        attention, feed_forward = layers[0].attention, layers[0].feed_forward
        matrices = {
            "wqkv": [layer.attention.wqkv.weight for layer in layers],
            "wo": [layer.attention.wo.weight for layer in layers],
            "w1": [layer.feed_forward.w1.weight for layer in layers],
            "w3": [layer.feed_forward.w3.weight for layer in layers],
            "w2": [layer.feed_forward.w2.weight for layer in layers],
        }
        bf16 = are_bfloat16(*(weight for group in matrices.values() for weight in group))
        self._kept: dict[str, list[torch.Tensor | None]] = {
            name: [pack(weight, bf16) for weight in group] for name, group in matrices.items()
        }
        self._kept["attention_norm"] = [_norm_weight(layer.attention_norm) for layer in layers]
        self._kept["ffn_norm"] = [_norm_weight(layer.ffn_norm) for layer in layers]
        self._norm = None if norm is None else norm.detach().clone()
        self._rope = model.rope().contiguous()
        self._lists = {name: pointers(group) for name, group in self._kept.items()}
        self.network = _Network(
            dim=model.config.dim, heads=attention.num_heads, kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim, hidden=feed_forward.w1.out_features, layers=len(layers), bf16=bf16,
            positions=len(self._rope), eps=model.config.norm_eps, rope=self._rope.data_ptr(),
            norm=None if self._norm is None else self._norm.data_ptr(),
            **{name: ctypes.addressof(group) for name, group in self._lists.items()},
        )  # fmt: skip
        outputs = attention.wqkv.out_features + attention.num_heads * attention.head_dim
        self._numbers = outputs + 2 * feed_forward.w1.out_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return sum(weight.nbytes for group in self._kept.values() for weight in group if weight is not None)

    def __call__(
        self, x: torch.Tensor, cache: KVCache, positions: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        """States (rows, n, dim) of new positions, whose keys and values are stored in the cache.

        Args:
            x: inputs (rows, n, dim).
            cache: of the model.
            positions: (rows, n) int64, from 0; those behind the rotary table have its last entry.
            visible: (rows, n, pending + n) bool, as of `TreeCache.tree_mask`; None: causal.

        Raises:
            StudioError: the cache is full.
        """
        rows, nodes, dim = x.shape
        cache.check_capacity(nodes)
        base, lengths = cache.kept()
        kept = (ctypes.c_int64 * rows)(*lengths)
        store, bias = cache.store, cache.bias
        positions, states = positions.contiguous(), x.clone(memory_format=torch.contiguous_format)
        visible = None if visible is None else visible.contiguous()
        threads = torch.get_num_threads()
        own = rows * nodes * dim + 2 * _QUERIES * (cache.max_length + _LANES)
        scratch = torch.empty(rows * nodes * self._numbers + threads * own)
        call = _Call(
            rows, nodes, base, cache.length - base, cache.max_length, threads, store.stride(0), store.stride(1),
            0 if bias is None else bias.stride(0), store.data_ptr(), ctypes.addressof(kept), positions.data_ptr(),
            None if visible is None else visible.data_ptr(), None if bias is None else bias.data_ptr(),
        )  # fmt: skip
        self._run(ctypes.byref(self.network), ctypes.byref(call), states.data_ptr(), scratch.data_ptr())
        cache.advance(nodes)
        return states


def _norm_weight(norm: nn.Module) -> torch.Tensor | None:
    """The weight of an `RMSNorm`; None where a block has no norm."""
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.detach().clone()


def pointers(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array:
    """Addresses of tensors as an array in C; keep it and the tensors alive while it is used."""
    return (ctypes.c_void_p * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def is_available(model: LlamaGen) -> bool:
    """Whether a whole `LlamaGen` runs in C on this machine; see `can_run`."""
    return can_run(model, model.config.vocab_size)


class NativeLlamaGen(ModelBackend[LlamaGen]):
    """The cached-decoding calls of `LlamaGen`, for single tokens, several, and trees; results differ by rounding only.

    Raises:
        StudioError: a model for which `is_available` is false.
    """

    @torch.no_grad()
    def __init__(self, model: LlamaGen):
        if not is_available(model):
            raise StudioError(
                "Native decoding needs a float32 model on the CPU with sizes divisible by 8, and a C compiler (cc) "
                "on the path; leave out weights to use what works here."
            )
        super().__init__(model)
        self.prefix_length, self.num_tokens, self.config = model.prefix_length, model.num_tokens, model.config
        self.device = model.device
        self._blocks = NativeBlocks(model, model.norm.weight)
        self.logits = NativeProduct(model.output.weight)
        self._embedding = model.tok_embeddings.weight.detach()

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self._blocks.weight_bytes + self.logits.weight.nbytes

    def new_cache(self, rows: int) -> KVCache:
        """As `LlamaGen.new_cache`."""
        return self.model.new_cache(rows)

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """As `LlamaGen.new_tree_cache`."""
        return self.model.new_tree_cache(rows, pending)

    def prefill(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.prefill`."""
        return self.logits(self.prefill_states(prefix, valid, cache)[:, -1])

    def prefill_states(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.prefill_states`."""
        rows, length, _ = prefix.shape
        mask = self.model.prefix_mask(valid, length)
        states = self._run(self.model.prepare_inputs(prefix, cache), cache, None if mask is None else mask[:, 0])
        if valid is not None:
            cache.mask_prefix(valid)
        return states

    def extend(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.extend`."""
        return self.logits(self._run(cache.add_region_conditioning(F.embedding(tokens, self._embedding)), cache, None))

    def extend_tree(
        self, tokens: torch.Tensor, cache: TreeCache, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """As `LlamaGen.extend_tree`."""
        x = cache.add_region_conditioning(F.embedding(tokens, self._embedding), positions)
        return self._blocks(x, cache, positions, visible)

    def _run(self, x: torch.Tensor, cache: KVCache, visible: torch.Tensor | None) -> torch.Tensor:
        """States (rows, n, dim) of positions that follow one another."""
        rows, n, _ = x.shape
        return self._blocks(x, cache, torch.arange(cache.length, cache.length + n).expand(rows, n), visible)


class NativeDrafter(ModelBackend[Drafter]):
    """The cached calls of a `Drafter` for which `can_run` is true; results differ by rounding only."""

    @torch.no_grad()
    def __init__(self, drafter: Drafter):
        super().__init__(drafter)
        self.config = drafter.config
        by_token, by_state = drafter.fc.weight.chunk(2, dim=1)
        self._tokens = F.linear(drafter.token_embeddings, by_token, drafter.fc.bias)
        self._states = NativeProduct(by_state)
        self._blocks = NativeBlocks(drafter, norm=None)

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """As `Drafter.new_tree_cache`."""
        return self.model.new_tree_cache(rows, pending)

    def extend_tree(
        self,
        tokens: torch.Tensor,
        states: torch.Tensor,
        cache: TreeCache,
        positions: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """As `Drafter.extend_tree`."""
        x = self._states(states).add_(F.embedding(tokens, self._tokens))
        if cache.region_conditioning is not None:
            x = cache.add_region_conditioning(x, positions.clamp(max=cache.region_conditioning.shape[1] - 1))
        return self._blocks(x, cache, positions, visible)
