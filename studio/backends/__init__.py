"""How a network is run fast. Decoding loops call `backends.select(model, weights)`; models do not know of backends.

"native" (`studio.backends.cpu_c` and the files named after it) runs in C on a CPU. "float32", "float16" and "int8"
(`studio.backends.packed`) need no compiler. "graphs" (`studio.backends.cuda_graphs`) has static shapes, for GPUs. A
backend is built once per model and reused until one of the model's weights changes, moves or disappears.
"""

import copy
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from studio.backends.cpu_c import NativeDrafter, NativeLlamaGen, can_run, is_available
from studio.backends.cpu_c_head import NativeHead, can_denoise
from studio.backends.cpu_c_pixels import NativeDecoder, can_decode
from studio.backends.cpu_c_sampling import can_race, can_test_guesses, guess_outcomes, race_winners
from studio.backends.cpu_c_student import NativeStudent, can_distil
from studio.backends.cpu_c_text import NativeT5, can_encode
from studio.backends.cuda_graphs import GraphedLlamaGen, GraphedStudent
from studio.backends.fingerprints import addresses, has_hooks, signature, weight_sums, weights_of
from studio.backends.packed import PackedLlamaGen, can_pack
from studio.checks import check_choice
from studio.models.diffusion_head import DenoisingNetwork
from studio.models.distilled import DistilledStudent
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen

__all__ = [
    "BACKENDS",
    "forced",
    "has_hooks",
    "select",
    "select_drafter",
    "select_head",
    "select_pixels",
    "select_race",
    "select_student",
    "select_text",
    "signature",
    "timed",
    "using",
    "wait",
    "weight_sums",
]

BACKENDS = ("plain", "packed", "native", "graphs")
_LARGEST_COPY_BYTES = 4 * 2**30
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


def select(model: LlamaGen, weights: str = "auto") -> LlamaGen | NativeLlamaGen | PackedLlamaGen | GraphedLlamaGen:
    """The network that a decoding loop calls: the model itself, or a faster backend with the same calls.

    Args:
        model: a `LlamaGen`.
        weights: "plain" is the model itself; "native", "float32", "float16", "int8" and "graphs" are backends;
            "auto" is the fastest of full precision on this machine. On a CPU "auto" keeps models above 4 GiB as they
            are, because a backend may hold a second copy of the weights.

    Raises:
        StudioError: the model, the processor or the machine cannot have this backend.
    """
    if weights == "auto":
        weights = _fastest(model)
    if weights == "plain":
        return model
    if weights == "graphs":
        return _cached(model, weights, lambda: GraphedLlamaGen(model), addresses)
    if weights == "native":
        return _cached(model, weights, lambda: NativeLlamaGen(model))
    return _cached(model, weights, lambda: PackedLlamaGen(model, weights))


def select_drafter(drafter: Drafter, weights: str = "auto") -> Drafter | NativeDrafter:
    """A drafter as it is, or its calls in C where that works, unless `weights` is "plain".

    Raises:
        StudioError: the drafter has no token embeddings yet.
    """
    drafter.check_embeddings()
    native = None if weights == "plain" else _native(drafter, can_run, NativeDrafter)
    return native or drafter


def select_head(network: DenoisingNetwork) -> NativeHead | None:
    """The backend that makes a reverse step of the diffusion head one call in C; None where that does not work."""
    return _native(network, can_denoise, NativeHead)


def select_student(student: DistilledStudent | nn.Module) -> nn.Module | NativeStudent | GraphedStudent:
    """A student as it is, or its calls in C or as CUDA graphs where that works."""
    if not isinstance(student, DistilledStudent):
        return student
    if _takes_graphs(student):
        return _cached(student, "graphs", lambda: GraphedStudent(student), addresses)
    return _native(student, can_distil, NativeStudent) or student


def select_text(encoder: nn.Module) -> NativeT5 | None:
    """The backend that runs a text encoder in C; None where that does not work."""
    return None if encoder.training or has_hooks(encoder) else _native(encoder, _any, _native_text)


Tokenizer = TypeVar("Tokenizer", bound=nn.Module)


def select_pixels(tokenizer: Tokenizer) -> Tokenizer:
    """An image tokenizer as it is, or, for decoding alone, a twin with the same weights whose decoder runs in C."""
    decoder = getattr(tokenizer, "decoder", None)
    native = None if decoder is None or has_hooks(tokenizer) else _native(decoder, _any, _native_decoder)
    if native is None:
        return tokenizer
    twin = copy.copy(tokenizer)
    twin.__dict__["_modules"] = {**tokenizer._modules, "decoder": native}
    return twin


def select_race(logits: torch.Tensor, noise: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """`race_winners` of `studio.backends.cpu_c_sampling`; None where it does not work for these tensors."""
    return race_winners if _runs_c() and can_race(logits, noise) else None


def select_guess_outcomes(logits: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """`guess_outcomes` of `studio.backends.cpu_c_sampling`; None where it does not work for these logits."""
    return guess_outcomes if _runs_c() and can_test_guesses(logits) else None


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, with what a GPU is still to do, and what it returns."""
    wait(device)
    began = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - began, result


def wait(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _takes_graphs(model: nn.Module) -> bool:
    """Whether its calls are made with static shapes: on a GPU, and wherever that is asked for."""
    on_gpu = next(model.parameters()).device.type == "cuda" and not has_hooks(model)
    return _forced.get() == "graphs" or (_forced.get() is None and on_gpu)


def _cached(model: nn.Module, name: str, build: Callable[[], Any], signed: Callable[..., Any] = signature) -> Any:
    """The backend of this name, built if there is none of the model's current weights; None is kept too.

    `signed` says what must not change; addresses are enough for what reads weights in place.
    """
    current, backends = signed(model), _backends.setdefault(model, {})
    if name not in backends or backends[name][0] != current:
        backends[name] = (current, build())
    return backends[name][1]


def _native(model: nn.Module, fits: Callable[[Any], bool], make: Callable[[Any], Any]) -> Any:
    """The backend of a model in C; None where it does not fit, or where something else was asked for."""
    if not _runs_c() or not fits(model):
        return None
    return _cached(model, "native", lambda: None if _is_large(model) else make(model))


def _any(model: nn.Module) -> bool:
    """For models whose examination takes long; the outcome is kept while their weights stay."""
    return True


def _native_text(encoder: nn.Module) -> NativeT5 | None:
    return NativeT5(encoder) if can_encode(encoder) else None


def _native_decoder(decoder: nn.Module) -> NativeDecoder | None:
    return NativeDecoder(decoder) if can_decode(decoder) else None


def _fastest(model: LlamaGen) -> str:
    if _takes_graphs(model):
        return "graphs"
    if _is_large(model) or _forced.get() == "plain":
        return "plain"
    if _runs_c() and is_available(model):
        return "native"
    return "float32" if can_pack(model) else "plain"


def _is_large(model: nn.Module) -> bool:
    return sum(weight.nbytes for weight in weights_of(model)) > _LARGEST_COPY_BYTES
