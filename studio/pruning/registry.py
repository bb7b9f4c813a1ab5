"""The methods by name, and what each needs."""

from collections.abc import Callable

from studio.checks import check_choice
from studio.errors import StudioError
from studio.pruning.baselines import random, uniform
from studio.pruning.divprune import divprune
from studio.pruning.globalcom2 import globalcom2
from studio.pruning.hired import hired

METHODS: dict[str, Callable] = {
    "divprune": divprune,
    "hired": hired,
    "globalcom2": globalcom2,
    "random": random,
    "uniform": uniform,
}

SCORES: dict[str, tuple[str, ...]] = {"hired": ("first", "last"), "globalcom2": ("logits",)}
"""The fields of `Attention` a method needs; none when it is not named."""

INSIDE = {
    "fastv": "FastV: keep what the last token attends to in the layer before the cut.",
    "pyramiddrop": "PyramidDrop: several cuts, each keeps what the last token attends to in the layer after it.",
}
"""Methods that score tokens inside the language model and nowhere else (see `studio.pruning.inside_model`)."""

WITH_REFERENCE = ("divprune", "hired", "globalcom2")
"""Methods with authors' code, whose numbers `reference=True` reproduces."""


def pruning_methods() -> dict[str, str]:
    """The methods by name, each with the first line of its description."""
    before = {name: str(method.__doc__).strip().splitlines()[0] for name, method in METHODS.items()}
    return {**before, **INSIDE}


def method_named(name: str) -> Callable:
    """The selector of that name.

    Raises:
        StudioError: an unknown name, or a method that needs a block of `studio.prune`.
    """
    if name in INSIDE:
        raise StudioError(f"{name} scores tokens inside the language model: use a block of studio.prune.")
    check_choice("The pruning method", name, (*METHODS, *INSIDE))
    return METHODS[name]
