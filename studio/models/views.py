"""Which arrangement of a LlamaGen a decoding loop runs: the model itself, or a faster view of the same weights.

"native" (`studio.models.native`) runs in C; "float32", "float16" and "int8" (`studio.models.packed`) need
no compiler. A view is kept and reused until one of the model's weights changes, moves or disappears.
"""

import weakref

import torch

from studio.models.native import NativeLlamaGen, is_available
from studio.models.packed import PackedLlamaGen, can_pack

_LARGEST_COPY_BYTES = 4 * 2**30
_views: "weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple]]" = weakref.WeakKeyDictionary()


def view_of(model, weights: str = "auto"):
    """The view of a model by name; "plain" is the model itself, "auto" the fastest of full precision that works here.

    "auto" keeps large models as they are: a view may hold a second copy of the weights.

    Errors: `StudioError` for a view that this model, processor or machine cannot have.
    """
    if weights == "auto":
        weights = _fastest(model)
    if weights == "plain":
        return model
    signature, views = _signature(model), _views.setdefault(model, {})
    if weights not in views or views[weights][0] != signature:
        view = NativeLlamaGen(model) if weights == "native" else PackedLlamaGen(model, weights)
        views[weights] = (signature, view)
    return views[weights][1]


def _fastest(model) -> str:
    if sum(weight.nbytes for weight in model.parameters()) > _LARGEST_COPY_BYTES:
        return "plain"
    if is_available(model):
        return "native"
    return "float32" if can_pack(model) else "plain"


def _signature(model) -> tuple:
    """Identity and content of all weights: storage address plus sum (writes through `.data` leave no other trace)."""
    with torch.no_grad():
        weights = list(model.parameters())
        sums = torch.stack([weight.sum(dtype=torch.float64) for weight in weights]).tolist()
    return tuple((weight.data_ptr(), total) for weight, total in zip(weights, sums, strict=True))
