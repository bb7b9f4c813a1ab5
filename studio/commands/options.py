"""Options that several commands share."""

import math
import re
import secrets
from typing import Annotated, Any

import typer

from studio.checks import MAX_INTEGER
from studio.errors import StudioError


def finite(value: float | None) -> float | None:
    """Refuse infinity and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def number(*names: str, help: str, show_default: bool | str = False, **limits: Any) -> Any:
    """A typer option that takes a finite number."""
    return typer.Option(*names, help=help, callback=finite, show_default=show_default, **limits)


def check_condition(prompt: str | None, class_label: str | None) -> None:
    """Refuse a call that has neither a prompt nor a class, or both.

    Raises:
        StudioError: it does.
    """
    if prompt is not None and class_label is not None:
        raise StudioError("A model takes a prompt or a class: leave the prompt or --class-label out.")
    if prompt is None and class_label is None:
        raise StudioError(
            'Say what to sample: a prompt such as "a red apple", or --class-label for a class-conditional model.'
        )


def seeds_of(seed: int | None, count: int) -> list[int]:
    """The seeds of images: the given one or a random one, and those that follow it.

    Raises:
        StudioError: they go beyond the largest seed.
    """
    first = secrets.randbelow(2**31) if seed is None else seed
    if first + count - 1 > MAX_INTEGER:
        raise StudioError(f"--seed {first} is too large for {count} images: give at most {MAX_INTEGER - count + 1}.")
    return [first + index for index in range(count)]


def parsed_tiles(text: str) -> tuple[int, int]:
    """Rows and columns of a scene's tiles, from "2x3"."""
    if not re.fullmatch("[1-4]x[1-4]", text):
        raise StudioError(f"--tiles is rows x columns, each from 1 to 4, such as 2x3, not {text}.")
    rows, columns = text.split("x")
    return int(rows), int(columns)


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps.", show_default="cuda if there is one")
]


def _dtype(choices):
    return Annotated[str | None, typer.Option("--dtype", help=choices, show_default="by device")]


Dtype = _dtype("float32, bfloat16 or float16.")
SamplingDtype = _dtype("float32, bfloat16, float16, or int8 weights on a CPU.")
Model = Annotated[str, typer.Option("--model", help="A bundled name, a model folder or a Hub id (owner/name).")]
ImageCount = Annotated[int, typer.Option("--num-images", min=1, max=10_000, help="How many images.")]
Guidance = Annotated[
    float | None,
    number("--guidance", help="Classifier-free guidance scale; 1 turns it off.", show_default="the model's"),
]
Temperature = Annotated[
    float | None, number("--temperature", help="Randomness of each token (1 = as the model predicts).")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Decides every random choice.")]
