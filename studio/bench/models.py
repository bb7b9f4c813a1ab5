"""What benchmarks measure: generators that are loaded, and sizes of random models, refused where they do not fit."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from studio.checkpoints.loading import load
from studio.checks import check_integer, shown
from studio.errors import StudioError
from studio.pipelines.base import ConditionalPipeline

Generator = TypeVar("Generator", bound=ConditionalPipeline)

MOST_RUNS = 1000
"""Runs of a side, of which the fastest or the median counts."""
MOST_IMAGES = 1024
"""Images at a time."""


def load_generator(
    name: str, device: str | None, kind: type[Generator], example: str = "emoji-ar", **more: Any
) -> Generator:
    """A text-conditional pipeline without its progress bar; arguments as of `studio.load`.

    Raises:
        StudioError: another kind of model; the message names the example.
    """
    pipe = load(name, device=device, **more)
    if not isinstance(pipe, kind) or not pipe.takes_text:
        label = kind.__name__.removesuffix("Pipeline").removeprefix("Conditional")
        sort = f"is no text-conditional {label}" if label else "is not text-conditional"
        raise StudioError(f"{name} {sort}: name {example} or a folder of that kind.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parse_sizes(text: str, most: Mapping[str, int]) -> dict[str, int]:
    """Sizes by name out of a text such as "dim=384,layers=8".

    Args:
        text: some sizes.
        most: the largest of each, by name.

    Raises:
        StudioError: another name, or a number that is none or out of range.
    """
    sizes = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in most or not value.isdecimal() or not value.isascii():
            known = f"{'=N,'.join(most)}=N"
            raise StudioError(f"Write sizes as {known} with whole numbers N above 0, not {shown(text)}.")
        if len(value) > len(str(most[name])):
            raise StudioError(f"{name} must be a whole number from 1 to {most[name]}, not one of {len(value)} digits.")
        sizes[name] = check_integer(name, int(value), 1, most[name])
    return sizes


def check_counts(**counts: int) -> None:
    """Check numbers of runs, trees and the like.

    Raises:
        StudioError: a number that is none, below 1 or above `MOST_RUNS`.
    """
    for name, value in counts.items():
        check_integer(name, value, 1, MOST_RUNS)


def check_fits(name: str, needed: int, device: torch.device) -> None:
    """Refuse what needs more bytes than are free.

    Raises:
        StudioError: it does.
    """
    free = free_bytes(device)
    if needed > free:
        have = f"{free / 2**30:.1f} GB of memory are free"
        raise StudioError(f"{name} needs {needed / 2**30:.1f} GB where {have}: choose smaller sizes.")


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
