"""Files that a command writes."""

from collections.abc import Callable
from pathlib import Path

from studio.console import warn
from studio.saving import save_all


def save(writers: dict[Path, Callable[[Path], object]]) -> None:
    """`save_all`, and a line for each file of other content that was replaced."""
    for path in save_all(writers):
        warn(f"{path} was there before and is replaced.")
