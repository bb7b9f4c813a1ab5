"""How a network is run fast. Decoding loops call `backends.select(model, weights)`; models do not know of backends.

"native" (`studio.backends.cpu_c` and the files named after it) runs in C on a CPU. "float32", "float16" and "int8"
(`studio.backends.packed`) need no compiler. "graphs" (`studio.backends.cuda_graphs`) has static shapes, for GPUs. A
backend is built once per model and reused until one of the model's weights changes, moves or disappears.
"""

import copy
import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, overload

import torch
from torch import nn

from studio.backends.cpu_c import NativeDrafter, NativeLlamaGen, can_run, is_available, pointers
from studio.backends.cpu_c_head import NativeHead, can_denoise
from studio.backends.cpu_c_pixels import NativeDecoder, can_decode
from studio.backends.cpu_c_student import NativeStudent, can_distil
from studio.backends.cpu_c_text import NativeT5, can_encode
from studio.backends.cuda_graphs import GraphedLlamaGen, GraphedStudent
from studio.backends.native_library import library, loaded_library
from studio.backends.packed import PackedLlamaGen, can_pack
from studio.checks import check_choice
from studio.models.diffusion_head import DenoisingNetwork
from studio.models.distilled import DistilledStudent
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen

BACKENDS = ("plain", "packed", "native", "graphs")
_LARGEST_COPY_BYTES = 4 * 2**30
_SUM_STRIDE = 61
_SUMMED = 128
_forced: ContextVar[str | None] = ContextVar("forced", default=None)
_backends: "weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[tuple, Any]]]" = weakref.WeakKeyDictionary()


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Runs what is left to choose by this backend.

    "plain" is PyTorch, "packed" has packed weights and no C, "native" is all of C, "graphs" has static shapes and, on a
    GPU, CUDA graphs. For comparisons. Models for which a backend does not work stay as they are.
    """
    check_choice("The backend", backend, BACKENDS)
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend of `using`, if any."""
    return _forced.get()


def _runs_c() -> bool:
    return _forced.get() in (None, "native")


@overload
def select(model: LlamaGen, weights: str = "auto") -> LlamaGen | NativeLlamaGen | PackedLlamaGen | GraphedLlamaGen: ...
@overload
def select(model: Drafter, weights: str = "auto") -> Drafter | NativeDrafter: ...


def select(
    model: LlamaGen | Drafter, weights: str = "auto"
) -> LlamaGen | NativeLlamaGen | PackedLlamaGen | GraphedLlamaGen | Drafter | NativeDrafter:
    """The network that a decoding loop calls: the model itself, or a faster backend with the same calls.

    Args:
        model: a `LlamaGen`, or its `Drafter`, which runs in C where that works unless `weights` is "plain".
        weights: "plain" is the model itself; "native", "float32", "float16", "int8" and "graphs" are backends;
            "auto" is the fastest of full precision on this machine. On a CPU "auto" keeps models above 4 GiB as they
            are, because a backend may hold a second copy of the weights.

    Raises:
        StudioError: the model, the processor or the machine cannot have this backend, or the drafter has no token
            embeddings yet.
    """
    if isinstance(model, Drafter):
        model.check_embeddings()
        if weights == "plain" or not _runs_c() or _is_large(model) or not can_run(model):
            return model
        return _cached(model, "native", lambda: NativeDrafter(model))
    if weights == "auto":
        weights = _fastest(model)
    if weights == "plain":
        return model
    if weights == "graphs":
        return _cached(model, weights, lambda: GraphedLlamaGen(model), _addresses)
    if weights == "native":
        return _cached(model, weights, lambda: NativeLlamaGen(model))
    return _cached(model, weights, lambda: PackedLlamaGen(model, weights))


def select_head(network: DenoisingNetwork) -> NativeHead | None:
    """The backend that makes a reverse step of the diffusion head one call in C; None where that does not work."""
    if not _runs_c() or _is_large(network) or not can_denoise(network):
        return None
    return _cached(network, "native", lambda: NativeHead(network))


def select_student(student: DistilledStudent | nn.Module) -> nn.Module | NativeStudent | GraphedStudent:
    """A student as it is, or its calls in C or as CUDA graphs where that works."""
    if isinstance(student, DistilledStudent) and _takes_graphs(student):
        return _cached(student, "graphs", lambda: GraphedStudent(student), _addresses)
    fits = isinstance(student, DistilledStudent) and _runs_c() and not _is_large(student) and can_distil(student)
    if not fits:
        return student
    return _cached(student, "native", lambda: NativeStudent(student))


def select_text(encoder: nn.Module) -> NativeT5 | None:
    """The backend that runs a text encoder in C; None where that does not work."""
    fits = _runs_c() and not encoder.training and not has_hooks(encoder) and not _is_large(encoder)
    if not fits or not can_encode(encoder):
        return None
    return _cached(encoder, "native", lambda: NativeT5(encoder))


def select_pixels(tokenizer: nn.Module) -> nn.Module:
    """An image tokenizer as it is, or, for decoding alone, a twin with the same weights whose decoder runs in C."""
    decoder = getattr(tokenizer, "decoder", None)
    if decoder is None or not _runs_c() or has_hooks(tokenizer) or not can_decode(decoder) or _is_large(decoder):
        return tokenizer
    twin = copy.copy(tokenizer)
    native = _cached(decoder, "native", lambda: NativeDecoder(decoder))
    twin.__dict__["_modules"] = {**tokenizer._modules, "decoder": native}
    return twin


def has_hooks(model: nn.Module) -> bool:
    """Whether a library such as accelerate moves parts of a model while they are called."""
    return any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in model.modules())


def signature(model: nn.Module) -> tuple | None:
    """What changes when a weight of the model does; None where its weights are not there to be looked at."""
    weights = [*model.parameters(), *model.buffers()]
    return None if any(weight.device.type == "meta" for weight in weights) else _signature(model)


@torch.no_grad()
def weight_sums(model: nn.Module) -> list[float]:
    """The sum of every 61st number of each weight and buffer: a fingerprint that changes when the weights do."""
    weights = [*model.parameters(), *model.buffers()]
    some = [weight.view(-1)[::_SUM_STRIDE] if weight.is_contiguous() else weight for weight in weights]
    return torch.stack([part.sum(dtype=torch.float64) for part in some]).tolist()


def _takes_graphs(model: nn.Module) -> bool:
    """Whether its calls are made with static shapes: on a GPU, and wherever that is asked for."""
    on_gpu = next(model.parameters()).device.type == "cuda" and not has_hooks(model)
    return _forced.get() == "graphs" or (_forced.get() is None and on_gpu)


def _addresses(model: nn.Module) -> tuple:
    return tuple(weight.data_ptr() for weight in [*model.parameters(), *model.buffers()])


def _cached(model: nn.Module, name: str, build: Callable[[], Any], signed: Callable[..., tuple] | None = None) -> Any:
    """The backend of this name, built if there is none of the model's current weights.

    `signed` says what must not change, by default `_signature`; addresses are enough for what reads weights in place.
    """
    signature, backends = (signed or _signature)(model), _backends.setdefault(model, {})
    if name not in backends or backends[name][0] != signature:
        backends[name] = (signature, build())
    return backends[name][1]


def _fastest(model: LlamaGen) -> str:
    if _takes_graphs(model):
        return "graphs"
    if _is_large(model) or _forced.get() == "plain":
        return "plain"
    if _runs_c() and is_available(model):
        return "native"
    return "float32" if can_pack(model) else "plain"


def _is_large(model: nn.Module) -> bool:
    return sum(weight.nbytes for weight in model.parameters()) > _LARGEST_COPY_BYTES


def _signature(model: nn.Module) -> tuple:
    """Identity and content of all weights: storage address, number of in-place writes, and sums of some numbers.

    The sums catch writes through `.data`, such as those of a moving average, which torch does not count.
    """
    weights = [*model.parameters(), *model.buffers()]
    fits = all(_is_dense(w) and w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
    sums = _native_sums(weights) if fits and library() is not None else weight_sums(model)
    return tuple((weight.data_ptr(), weight._version, total) for weight, total in zip(weights, sums, strict=True))


def _is_dense(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def _native_sums(weights: list[torch.Tensor]) -> list[float]:
    """Sums of some numbers of float32 weights on the CPU."""
    sizes = (ctypes.c_int64 * len(weights))(*[weight.numel() for weight in weights])
    sums = (ctypes.c_double * len(weights))()
    loaded_library().studio_sums(pointers(weights), sizes, len(weights), _SUMMED, sums)
    return list(sums)
