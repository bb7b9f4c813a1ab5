"""Files that commands write."""

from collections.abc import Callable
from pathlib import Path

from studio.console import warn
from studio.errors import StudioError


def save(writers: dict[Path, Callable[[Path], object]]) -> None:
    """`save_all`, and a line for each file of other content that was replaced."""
    from studio.saving import save_all

    for path in save_all(writers):
        warn(f"{path} was there before and is replaced.")


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
