"""What a training run is asked for: flags, a TOML file and a preset, merged and checked."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from studio.checks import MAX_INTEGER, MAX_NUMBER, check_integer, check_number, check_text, shown
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
        tokens: tokens of a one-dimensional tokenizer's row, or of an image behind a quecc.
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
        target: the pipeline that a drafter or a student, or the reader that a quecc or a diffrate is made for.
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
MOST_STEPS, MOST_LAYERS = 10**9, 256
_INTEGERS = {
    "size": (8, 4096), "grid": (1, 1024), "tokens": (1, 1 << 16), "codes": (2, 1 << 20), "dim": (8, 1 << 14),
    "layers": (1, MOST_LAYERS), "steps": (1, MOST_STEPS), "batch_size": (1, 1 << 16), "accumulate": (1, 1 << 16),
    "warmup": (0, MOST_STEPS), "seed": (0, MAX_INTEGER), "sample_every": (1, MOST_STEPS),
}  # fmt: skip
_NUMBERS = {"cooldown": (0, 1), "average": (0, 0.99999)}
_MOST_WEIGHTS = 1 << 31  # of a square matrix in each layer


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
    merged: dict[str, Any] = {}
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
    options = Options(**{key: _checked(key, value) for key, value in merged.items()})
    if (options.dim or 0) ** 2 * (options.layers or 1) > _MOST_WEIGHTS:
        raise StudioError(f"{options.layers} layers of width {options.dim} are too many weights: choose fewer of one.")
    return options


def _checked(key: str, value: Any) -> Any:
    wanted: Any = next(iter(get_args(_FIELDS[key].type)), _FIELDS[key].type)
    if wanted is int:
        return check_integer(key, value, *_INTEGERS[key])
    if wanted is float:
        return check_number(key, value, *_NUMBERS.get(key, (0, MAX_NUMBER)), above=key not in _NUMBERS)
    if not isinstance(value, wanted):
        words = {str: "text", bool: "true or false", dict: "a table"}[wanted]
        raise StudioError(f"{key} must be {words}, not {shown(value)}.")
    return value


def checked_setting(name: str, value: Any, default: Any) -> Any:
    """Check a value of a `[model]` or `[sampling]` table by its default; those without one are numbers.

    Raises:
        StudioError: another type, or a number out of range.
    """
    if isinstance(default, str):
        return check_text(name, value, 100)
    if isinstance(default, float):
        return check_number(name, value)
    most = MOST_LAYERS if name.endswith(("layers", "depth")) else 1 << 20
    return check_integer(name, value, 0 if default == 0 else 1, most)
