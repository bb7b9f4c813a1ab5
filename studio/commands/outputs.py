"""Files that commands write."""

import os
from collections.abc import Callable
from pathlib import Path

from studio.console import warn
from studio.errors import StudioError
from studio.files import user_path


def save(writers: dict[Path, Callable[[Path], object]]) -> None:
    """`save_all`, and a line for each file of other content that was replaced."""
    from studio.saving import save_all

    for path in save_all(writers):
        warn(f"{path} was there before and is replaced.")


def check_apart(out: Path, read: Path | None) -> None:
    """Check that a command does not write its result over a file that it reads.

    Raises:
        StudioError: both paths lead to the same file.
    """
    if read is not None and os.path.exists(out) and os.path.exists(user_path(read)) and out.samefile(user_path(read)):
        raise StudioError(f"{out} would be written over the file that is read: choose another --out.")


def check_figure(figure: Path | None) -> None:
    """Check the path of a chart before anything is measured.

    Raises:
        StudioError: the path does not end in .svg or cannot be written.
    """
    from studio.saving import check_writable

    if figure is None:
        return
    if figure.suffix != ".svg":
        raise StudioError(f"The figure is an SVG file: give a path that ends in .svg, not {figure}.")
    check_writable(figure)


def save_figure(figure: Path | None, chart: Callable[[], str]) -> None:
    """Write the SVG text that `chart()` returns, if there is a path."""
    if figure is not None:
        text = chart()
        save({figure: lambda path: path.write_text(text, encoding="utf-8")})
