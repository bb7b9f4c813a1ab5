"""`studio data`."""

from pathlib import Path
from typing import Annotated

import typer

from studio.commands.options import Json
from studio.console import emit, say


def build(
    out: Annotated[Path, typer.Argument(help="The archive to write.")] = Path("studio/data/fluent-emoji.zip"),
    source: Annotated[
        Path | None, typer.Option(help="Folder with the npm packages instead of fetching them.", show_default=False)
    ] = None,
    as_json: Json = False,
):
    """Make the picture archive from its npm packages."""
    from studio.data.build import build_archive
    from studio.saving import check_writable

    check_writable(out)
    concepts = build_archive(out, source)
    emit({"path": str(out), "concepts": concepts})
    say(f"{concepts} concepts: {out}")
