"""The methods by name, and what each needs."""

from collections.abc import Callable

from studio.checks import check_choice
from studio.errors import StudioError
from studio.pruning.baselines import random, uniform
from studio.pruning.cdpruner import cdpruner
from studio.pruning.divprune import divprune
from studio.pruning.evs import evs
from studio.pruning.globalcom2 import globalcom2
from studio.pruning.hired import hired
from studio.pruning.mmtok import mmtok
from studio.pruning.scope import coverage, scope
from studio.pruning.vidcom2 import vidcom2
from studio.pruning.vscan import vscan

METHODS: dict[str, Callable] = {
    "divprune": divprune,
    "hired": hired,
    "globalcom2": globalcom2,
    "scope": scope,
    "coverage": coverage,
    "cdpruner": cdpruner,
    "mmtok": mmtok,
    "random": random,
    "uniform": uniform,
}

VIDEO: dict[str, Callable] = {"evs": evs, "vidcom2": vidcom2}
"""Methods for videos; they take features and the number of frames."""

SELECTORS: dict[str, Callable] = {**METHODS, **VIDEO, "vscan": vscan}
"""All that choose before the language model; "vscan" does it as the first of its two cuts only."""

SCORES: dict[str, tuple[str, ...]] = {
    "hired": ("first", "last"),
    "globalcom2": ("logits",),
    "scope": ("last",),
    "vscan": ("shallow", "last"),
}
"""The fields of `Attention` a method needs; none when it is not named."""

READS_TEXT = ("cdpruner", "mmtok")
"""Methods that need the embeddings of the question, `text`."""

INSIDE = {
    "fastv": "FastV: keep what the last token attends to in the layer before the cut.",
    "pyramiddrop": "PyramidDrop: several cuts, each keeps what the last token attends to in the layer after it.",
    "vscan": "VScan: by what CLS attends to, with merging, then by what the last token attends to halfway.",
}
"""Methods that score tokens inside the language model and nowhere else (see `studio.pruning.inside_model`)."""

IN_CACHE = {
    "coverage": "Coverage: tokens to which the others are nearest, the same in all layers.",
    "coverage-merge": "Coverage with merging: all other tokens are merged into those to which they are nearest.",
    "snapkv": "SnapKV: what the last tokens of the prompt attend to.",
    "h2o": "H2O: half the latest tokens, half those with the most attention.",
    "prefixkv": "PrefixKV: the same share of attention in every layer.",
    "kvcrush": "KVCrush: by attention, and some of those on which heads disagree.",
    "ems": "EMS: by attention, and redundant tokens are merged into those that stay.",
    "lookm": "LOOK-M: by attention, and all other tokens are merged into those that stay.",
}
"""Methods that shorten the KV cache when the prompt has been read (see `studio.pruning.kv_cache`)."""

IN_TOWER = {
    "tome": "ToMe: tokens that resemble one another are merged.",
    "diffrate": "DiffRate: tokens are ranked, the lowest merged or pruned; without numbers, as learned for the model.",
}
"""Methods that merge tokens inside the vision tower (see `studio.pruning.merging`)."""

WITH_REFERENCE = ("divprune", "hired", "globalcom2")
"""Methods with authors' code, whose numbers `reference=True` reproduces."""


def pruning_methods(kind: str = "image") -> dict[str, str]:
    """The methods by name, each with the first line of its description.

    Args:
        kind: "image" or "video", what they prune.

    Raises:
        StudioError: another kind.
    """
    check_choice("kind", kind, ("image", "video"))
    methods = VIDEO if kind == "video" else METHODS
    before = {name: str(method.__doc__).strip().splitlines()[0] for name, method in methods.items()}
    return {**before, **(INSIDE if kind == "image" else {})}


def compression_methods() -> dict[str, str]:
    """The methods of `studio.compress` by name, each with a line of description."""
    return dict(IN_CACHE)


def merging_methods() -> dict[str, str]:
    """The methods of `studio.merge_tokens` by name, each with a line of description."""
    return dict(IN_TOWER)


def pruning_place(method: str) -> str:
    """Where a method takes tokens away: "before the model", "in the model" or, as VScan, "before and in the model"."""
    return {"vscan": "before and in the model"}.get(method, "in the model" if method in INSIDE else "before the model")


def method_named(name: str) -> Callable:
    """The selector of that name.

    Raises:
        StudioError: an unknown name, or a method that needs a block of `studio.prune`.
    """
    if name in INSIDE:
        raise StudioError(f"{name} scores tokens inside the language model: use a block of studio.prune.")
    check_choice("The pruning method", name, (*METHODS, *INSIDE, *VIDEO))
    return {**METHODS, **VIDEO}[name]
