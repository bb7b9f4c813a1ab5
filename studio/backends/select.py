"""Which arrangement of a model a decoding loop runs: the model itself, or a faster view of the same weights.

"native" (`studio.backends.cpu_c`, `native_drafter`, `native_head`) runs in C; "float32", "float16" and "int8"
(`studio.backends.packed`) need no compiler. A view is kept and reused until one of the model's weights changes, moves
or disappears.
"""

import weakref
from collections.abc import Callable

import torch

from studio.backends.cpu_c import NativeDrafter, NativeLlamaGen, can_run, is_available
from studio.backends.cpu_c_head import NativeHead, can_denoise
from studio.backends.packed import PackedLlamaGen, can_pack

_LARGEST_COPY_BYTES = 4 * 2**30
_SUMMED_STEP = 61
_views: "weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple]]" = weakref.WeakKeyDictionary()


def view_of(model, weights: str = "auto"):
    """The view of a `LlamaGen` by name; "plain" is the model itself, "auto" the fastest of full precision here.

    "auto" keeps large models as they are: a view may hold a second copy of the weights.

    Errors: `StudioError` for a view that this model, processor or machine cannot have.
    """
    if weights == "auto":
        weights = _fastest(model)
    if weights == "plain":
        return model
    if weights == "native":
        return _kept(model, weights, lambda: NativeLlamaGen(model))
    return _kept(model, weights, lambda: PackedLlamaGen(model, weights))


def drafter_view(drafter, weights: str = "auto"):
    """The view of a `Drafter` that goes with its target's: in C where that works, unless `weights` is "plain"."""
    if weights == "plain" or _is_large(drafter) or not can_run(drafter):
        return drafter
    return _kept(drafter, "native", lambda: NativeDrafter(drafter))


def head_view(network) -> NativeHead | None:
    """The view of a `DenoisingNetwork` with which a reverse step is one call; None where that does not work."""
    if _is_large(network) or not can_denoise(network):
        return None
    return _kept(network, "native", lambda: NativeHead(network))


def _kept(model, name: str, make: Callable):
    """The view of that name, made where there is none of these weights."""
    signature, views = _signature(model), _views.setdefault(model, {})
    if name not in views or views[name][0] != signature:
        views[name] = (signature, make())
    return views[name][1]


def _fastest(model) -> str:
    if _is_large(model):
        return "plain"
    if is_available(model):
        return "native"
    return "float32" if can_pack(model) else "plain"


def _is_large(model) -> bool:
    return sum(weight.nbytes for weight in model.parameters()) > _LARGEST_COPY_BYTES


def _signature(model) -> tuple:
    """Identity and content of all weights: storage address, number of writes, and the sum of some numbers.

    The sum is for writes through `.data`, such as a moving average's, which are not counted.
    """
    weights, sums = [*model.parameters(), *model.buffers()], weight_sums(model)
    return tuple((weight.data_ptr(), weight._version, total) for weight, total in zip(weights, sums, strict=True))


@torch.no_grad()
def weight_sums(model) -> list[float]:
    """The sum of some numbers of each of a model's weights: other weights have other sums."""
    weights = [*model.parameters(), *model.buffers()]
    some = [weight.view(-1)[::_SUMMED_STEP] if weight.is_contiguous() else weight for weight in weights]
    return torch.stack([part.sum(dtype=torch.float64) for part in some]).tolist()
