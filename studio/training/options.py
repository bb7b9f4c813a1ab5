"""What a training run is asked for: flags, a TOML file and a preset, merged and checked."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from studio.checks import shown
from studio.errors import StudioError

PRESETS = Path(__file__).with_name("presets")
FAMILY = (
    "emoji-judge", "emoji-vq", "emoji-text", "emoji-ar", "emoji-distilled", "emoji-drafter", "emoji-kl", "emoji-mar",
    "emoji-mar-draft", "emoji-rvq", "emoji-resgen", "emoji-bridge", "emoji-1d", "emoji-1d-ar", "emoji-tower",
    "emoji-vlm",
)  # fmt: skip
"""The presets that `--preset family` runs, in this order."""


@dataclass(frozen=True)
class Options:
    """One run. `None` is the default of the kind.

    Attributes:
        kind: one of `studio.training.KINDS`.
        data: `"emoji"` or an image folder.
        size: side of the images in pixels.
        crop, flip: as of `studio.data.source.open_source`.
        grid: tokens a side of a tokenizer's grid.
        tokens: tokens of a one-dimensional tokenizer's row.
        codes: entries of a codebook.
        dim, layers: width and depth of the network.
        steps: optimiser steps; instead, `minutes` of training.
        batch_size: images a step, over all processes, before `accumulate` batches are added up.
        learning_rate: the peak.
        warmup: steps until it is reached.
        cooldown: share of the run over which it falls to zero.
        average: decay of the exponential average of the weights that is exported.
        seed: decides everything random.
        init_from: weights to start from: a bundled name, a folder, or a run beside this one.
        tokenizer, text_encoder: what a generator is built on, named in the same way.
        target: the pipeline that a drafter or a student is made for.
        sample_every: steps between validations, each with a sheet of samples.
        tracker: a tracker of accelerate, such as `"tensorboard"`, beside `metrics.csv`.
        model: further settings of the network, by the names of its configuration.
        sampling: defaults of the exported pipeline, such as `default_guidance_scale`.
    """

    kind: str
    data: str = "emoji"
    size: int | None = None
    crop: str = "centre"
    flip: bool = False
    grid: int | None = None
    tokens: int | None = None
    codes: int | None = None
    dim: int | None = None
    layers: int | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: int | None = None
    cooldown: float | None = None
    average: float = 0.999
    seed: int = 0
    init_from: str | None = None
    tokenizer: str | None = None
    text_encoder: str | None = None
    target: str | None = None
    sample_every: int = 500
    tracker: str | None = None
    model: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)


_FIELDS = {each.name: each for each in dataclasses.fields(Options)}
_LEAST = {
    "size": 8, "grid": 1, "tokens": 1, "codes": 2, "dim": 8, "layers": 1, "steps": 1, "batch_size": 1, "accumulate": 1,
    "warmup": 0, "seed": 0, "sample_every": 1,
}  # fmt: skip
_MOST = 2**63 - 1
_RANGES = {"cooldown": (0, 1, "a number from 0 to 1"), "average": (0, 0.99999, "a number from 0 to 0.99999")}


def read_toml(file: str | Path) -> dict:
    """The options of a TOML file.

    Raises:
        StudioError: it cannot be read, or holds a key that is no option.
    """
    try:
        with open(file, "rb") as stream:
            given = tomllib.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise StudioError(f"{file} cannot be read ({str(error).splitlines()[0]}).") from error
    if unknown := [key for key in given if key not in _FIELDS]:
        raise StudioError(f"{file} has no option {', no '.join(unknown)}; there are {', '.join(_FIELDS)}.")
    return given


def preset_names() -> list[str]:
    """The presets by name."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict:
    """The options of a preset."""
    if name not in preset_names():
        raise StudioError(f"There is no preset {shown(name)}; choose one of {', '.join((*preset_names(), 'family'))}.")
    return read_toml(PRESETS / f"{name}.toml")


def merge(*sources: dict) -> Options:
    """Options of several sources, later ones winning; tables are merged key by key, `None` says nothing.

    Raises:
        StudioError: no kind, or a value that cannot be used, by name.
    """
    merged = {}
    for source in sources:
        if unknown := [key for key in source if key not in _FIELDS]:
            raise StudioError(f"There is no option {', '.join(unknown)}; there are {', '.join(_FIELDS)}.")
        if source.get("steps") is not None and source.get("minutes") is not None:
            raise StudioError("Say how long with steps or with minutes, not with both.")
        for key, value in source.items():
            if value is None:
                continue
            if key in ("steps", "minutes"):  # the later of the two says how long
                merged.pop("minutes" if key == "steps" else "steps", None)
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    if "kind" not in merged:
        raise StudioError("Say what to train: studio train KIND, or --preset NAME.")
    for key, value in merged.items():
        _check(key, value)
    return Options(**merged)


def _check(key, value):
    wanted = next(iter(get_args(_FIELDS[key].type)), _FIELDS[key].type)
    if wanted is int:
        valid = isinstance(value, int) and not isinstance(value, bool) and _LEAST[key] <= value <= _MOST
        words = f"a whole number of at least {_LEAST[key]}"
    elif wanted is float:
        low, high, words = _RANGES.get(key, (0, math.inf, "a positive number"))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        valid = number and math.isfinite(value) and low <= value <= high and (value > 0 or key in _RANGES)
    else:
        valid, words = isinstance(value, wanted), {str: "text", bool: "true or false", dict: "a table"}[wanted]
    if not valid:
        raise StudioError(f"{key} must be {words}, not {shown(value)}.")
