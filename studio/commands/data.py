"""`studio data`."""

from pathlib import Path
from typing import Annotated

import typer

from studio.commands.options import Json, parsed_tiles
from studio.console import emit, say
from studio.errors import StudioError


def build(
    out: Annotated[Path, typer.Argument(help="The archive to write.")] = Path("studio/data/fluent-emoji.zip"),
    source: Annotated[
        Path | None, typer.Option(help="Folder of the npm packages; they are downloaded otherwise.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the image archive from its npm packages."""
    from studio.data.build import build_archive
    from studio.saving import check_writable

    if out.suffix.lower() != ".zip":
        raise StudioError(f"The archive is a .zip file: give a path that ends in .zip, not {out}.")
    check_writable(out)
    concepts = build_archive(out, source)
    emit({"path": str(out), "concepts": concepts})
    say(f"{concepts} concepts: {out}")


def scene(
    out: Annotated[Path, typer.Argument(help="The image to write, a .png file.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the scene.")] = 0,
    tiles: Annotated[str, typer.Option(help="Rows and columns of 96 px tiles, each from 1 to 4.")] = "2x2",
    questions: Annotated[int, typer.Option(min=0, help="How many questions to print.")] = 12,
    as_json: Json = False,
) -> None:
    """Sample a scene of emoji and words, and print questions and answers about it."""
    import numpy as np
    from PIL import Image

    from studio.commands.outputs import save
    from studio.data.scenes import draw_scene
    from studio.saving import check_writable

    rows, columns = parsed_tiles(tiles)
    if out.suffix.lower() != ".png":
        raise StudioError(f"A scene is written as PNG: give a path that ends in .png, not {out}.")
    check_writable(out)
    sampled = draw_scene(np.random.default_rng(seed), (rows, columns), questions)
    save({out: lambda path: Image.fromarray(sampled.image).save(path, format="PNG")})
    asked = [{"kind": asked.kind, "question": asked.text, "answer": asked.answer} for asked in sampled.questions]
    emit({"path": str(out), "seed": seed, "tiles": [rows, columns], "questions": asked})
    for one in asked:
        say(f"{one['question']} {one['answer']}")
    say(f"{out}")
