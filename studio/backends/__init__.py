"""How a network is run fast. Decoding loops call `backends.select(model, weights)`; models do not know of backends.

"native" (`studio.backends.cpu_c`, `studio.backends.cpu_c_head`) runs in C on a CPU. "float32", "float16" and "int8"
(`studio.backends.packed`) need no compiler. A backend is built once per model and reused until one of the model's
weights changes, moves or disappears.
"""

import weakref
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from studio.backends.cpu_c import NativeDrafter, NativeLlamaGen, can_run, is_available
from studio.backends.cpu_c_head import NativeHead, can_denoise
from studio.backends.packed import PackedLlamaGen, can_pack
from studio.models.diffusion_head import DenoisingNetwork
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen

_LARGEST_COPY_BYTES = 4 * 2**30
_SUM_STRIDE = 61
_backends: "weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[tuple, Any]]]" = weakref.WeakKeyDictionary()


@overload
def select(model: LlamaGen, weights: str = "auto") -> LlamaGen | NativeLlamaGen | PackedLlamaGen: ...
@overload
def select(model: Drafter, weights: str = "auto") -> Drafter | NativeDrafter: ...


def select(
    model: LlamaGen | Drafter, weights: str = "auto"
) -> LlamaGen | NativeLlamaGen | PackedLlamaGen | Drafter | NativeDrafter:
    """The network that a decoding loop calls: the model itself, or a faster backend with the same calls.

    Args:
        model: a `LlamaGen`, or its `Drafter`, which runs in C where that works unless `weights` is "plain".
        weights: "plain" is the model itself; "native", "float32", "float16" and "int8" are backends; "auto" is the
            fastest of full precision on this machine. "auto" keeps models above 4 GiB as they are, because a backend
            may hold a second copy of the weights.

    Raises:
        StudioError: the model, the processor or the machine cannot have this backend, or the drafter has no token
            embeddings yet.
    """
    if isinstance(model, Drafter):
        model.check_embeddings()
        if weights == "plain" or _is_large(model) or not can_run(model):
            return model
        return _cached(model, "native", lambda: NativeDrafter(model))
    if weights == "auto":
        weights = _fastest(model)
    if weights == "plain":
        return model
    if weights == "native":
        return _cached(model, weights, lambda: NativeLlamaGen(model))
    return _cached(model, weights, lambda: PackedLlamaGen(model, weights))


def select_head(network: DenoisingNetwork) -> NativeHead | None:
    """The backend that makes a reverse step of the diffusion head one call in C; None where that does not work."""
    if _is_large(network) or not can_denoise(network):
        return None
    return _cached(network, "native", lambda: NativeHead(network))


@torch.no_grad()
def weight_sums(model: nn.Module) -> list[float]:
    """The sum of every 61st number of each weight and buffer: a fingerprint that changes when the weights do."""
    weights = [*model.parameters(), *model.buffers()]
    some = [weight.view(-1)[::_SUM_STRIDE] if weight.is_contiguous() else weight for weight in weights]
    return torch.stack([part.sum(dtype=torch.float64) for part in some]).tolist()


def _cached(model: nn.Module, name: str, build: Callable[[], Any]) -> Any:
    """The backend of this name, built if there is none of the model's current weights."""
    signature, backends = _signature(model), _backends.setdefault(model, {})
    if name not in backends or backends[name][0] != signature:
        backends[name] = (signature, build())
    return backends[name][1]


def _fastest(model: LlamaGen) -> str:
    if _is_large(model):
        return "plain"
    if is_available(model):
        return "native"
    return "float32" if can_pack(model) else "plain"


def _is_large(model: nn.Module) -> bool:
    return sum(weight.nbytes for weight in model.parameters()) > _LARGEST_COPY_BYTES


def _signature(model: nn.Module) -> tuple:
    """Identity and content of all weights: storage address, number of in-place writes, and `weight_sums`.

    The sums catch writes through `.data`, such as those of a moving average, which torch does not count.
    """
    weights, sums = [*model.parameters(), *model.buffers()], weight_sums(model)
    return tuple((weight.data_ptr(), weight._version, total) for weight, total in zip(weights, sums, strict=True))
