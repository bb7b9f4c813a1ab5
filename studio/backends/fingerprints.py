"""What tells whether the weights of a model are still those that a backend was built from."""

import ctypes
import weakref
from typing import Any

import torch
from torch import nn

from studio.backends.cpu_c import pointers
from studio.backends.native_library import library, loaded_library

_SUM_STRIDE = 61
_SUMMED = 128
_arrays: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Any]]" = weakref.WeakKeyDictionary()


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules. The generators of torch take several times as long, which shows beside a short call."""
    modules = [model]
    for module in modules:
        modules += [child for child in vars(module)["_modules"].values() if child is not None]
    return modules


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers; those that several modules share come several times."""
    groups = [group for module in _modules(model) for group in (module._parameters, module._buffers) if group]
    return [weight for group in groups for weight in group.values() if weight is not None]


def has_hooks(model: nn.Module) -> bool:
    """Whether a library such as accelerate moves parts of a model while they are called."""
    return any("_hf_hook" in (own := vars(module)) or "_diffusers_hook" in own for module in _modules(model))


def addresses(model: nn.Module) -> tuple:
    """Where the weights of a model are."""
    return tuple(weight.data_ptr() for weight in weights_of(model))


def signature(model: nn.Module) -> tuple | None:
    """Identity and content of all weights: addresses, numbers of in-place writes, and sums of some numbers.

    The sums catch writes through `.data`, such as those of a moving average, which torch does not count. None where
    the weights are not there to be looked at.
    """
    weights = weights_of(model)
    places = tuple([(weight.data_ptr(), weight._version) for weight in weights])
    kept = _arrays.get(model)
    if kept is None or kept[0] != places:
        if any(weight.device.type == "meta" for weight in weights):
            return None
        kept = _arrays[model] = (places, _summed_arrays(weights))
    if kept[1] is None:
        return places, tuple(weight_sums(model))
    loaded_library().studio_sums(*kept[1])
    return places, tuple(kept[1][-1])


def _summed_arrays(weights: list[torch.Tensor]) -> tuple | None:
    """The arguments of `studio_sums`; None for weights that it cannot read."""
    dense = all(w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    if not dense or library() is None or any(w.dtype != torch.float32 or w.device.type != "cpu" for w in weights):
        return None
    sizes = (ctypes.c_int64 * len(weights))(*[weight.numel() for weight in weights])
    return pointers(weights), sizes, len(weights), _SUMMED, (ctypes.c_double * len(weights))()


@torch.no_grad()
def weight_sums(model: nn.Module) -> list[float]:
    """The sum of every 61st number of each weight and buffer: a fingerprint that changes when the weights do."""
    weights = [*model.parameters(), *model.buffers()]
    some = [weight.view(-1)[::_SUM_STRIDE] if weight.is_contiguous() else weight for weight in weights]
    return torch.stack([part.sum(dtype=torch.float64) for part in some]).tolist()
