"""Figures that commands write beside what they print."""

from collections.abc import Callable
from pathlib import Path

from studio.errors import StudioError


def check_figure(figure: Path | None) -> None:
    """Raises a `StudioError` for a figure that is no SVG file or cannot be written, before anything is measured."""
    from studio.saving import check_writable

    if figure is None:
        return
    if figure.suffix != ".svg":
        raise StudioError(f"The figure is an SVG file: name it with .svg, not {figure}.")
    check_writable(figure)


def save_figure(figure: Path | None, sample: Callable[[], str]) -> None:
    """Writes what `sample()` returns, if a figure is wanted."""
    from studio.commands.saved import save

    if figure is not None:
        text = sample()
        save({figure: lambda path: path.write_text(text, encoding="utf-8")})
