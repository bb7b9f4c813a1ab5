"""`studio train` and `studio evaluate`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from studio.commands.decodings import check_given, decoding_of, given, named, with_decoding
from studio.commands.options import Device, Json, number, parsed_tiles
from studio.console import emit, quiet_libraries, say
from studio.training import KINDS
from studio.training import train as run
from studio.training import train_family as run_family

Folder = Annotated[str | None, typer.Option(help="Bundled name, folder, or a run beside --out.", show_default=False)]


def _count(help: str, least: int = 1) -> Any:
    return typer.Option(min=least, help=help, show_default="by kind of model")


def train(
    kind: Annotated[str | None, typer.Argument(help=f"{', '.join(KINDS)}.", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of images, or emoji, the bundled set.", show_default="emoji")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Options of a bundled model, such as emoji-vq; family trains all.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of options; flags win.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state in the folder.")] = False,
    size: Annotated[int | None, _count("Side of the images in pixels.", 8)] = None,
    crop: Annotated[
        str | None, typer.Option(help="centre, random or none (squeezed to a square).", show_default="centre")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror training images at random.")] = False,
    grid: Annotated[int | None, _count("Tokens a side of a tokenizer.")] = None,
    tokens: Annotated[
        int | None, _count("Tokens of a one-dimensional tokenizer, or of an image behind a quecc.")
    ] = None,
    codes: Annotated[int | None, _count("Entries of a codebook.", 2)] = None,
    dim: Annotated[int | None, _count("Width of the network.", 8)] = None,
    layers: Annotated[int | None, _count("Depth of the network.")] = None,
    steps: Annotated[int | None, _count("Optimiser steps.")] = None,
    minutes: Annotated[float | None, number(help="Train for this long instead of --steps.", min=0)] = None,
    batch_size: Annotated[int | None, _count("Images a step.")] = None,
    accumulate: Annotated[int | None, _count("Batches whose gradients are added up.")] = None,
    learning_rate: Annotated[float | None, number(help="Peak learning rate.", min=0)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Decides every random choice.", show_default="0")
    ] = None,
    init_from: Folder = None,
    tokenizer: Folder = None,
    text_encoder: Folder = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The pipeline that a drafter or student is for, or the reader of a quecc or diffrate.",
            show_default=False,
        ),
    ] = None,
    sample_every: Annotated[int | None, _count("Steps between validations with samples.")] = None,
    tracker: Annotated[
        str | None, typer.Option(help="A tracker of accelerate, such as tensorboard.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model on your own images, or a bundled model again."""
    quiet_libraries()
    given: dict[str, Any] = {
        "kind": kind, "data": data, "size": size, "crop": crop, "flip": flip or None, "grid": grid, "tokens": tokens,
        "codes": codes, "dim": dim, "layers": layers, "steps": steps, "minutes": minutes, "batch_size": batch_size,
        "accumulate": accumulate, "learning_rate": learning_rate, "seed": seed, "init_from": init_from,
        "tokenizer": tokenizer, "text_encoder": text_encoder, "target": target, "sample_every": sample_every,
        "tracker": tracker,
    }  # fmt: skip
    command = shlex.join(["studio", *(word for word in sys.argv[1:] if word not in ("--resume", "--json"))])
    if preset == "family":
        results = run_family(out=out, resume=resume, command=command, config=config, **given)
        emit(results)
        for name, result in results.items():
            say(f"{name:16} {result['steps']} steps, {result['seconds'] / 60:.1f} minutes: {result['folder']}")
        return
    result = run(preset=preset, config=config, out=out, resume=resume, command=command, **given)
    emit(result)
    skipped = result.get("skipped", [])
    for key, value in _flat({key: value for key, value in result.items() if key != "skipped"}):
        say(f"{key:16} {value}")
    if skipped:
        say(f"{len(skipped)} files could not be read and were left out:")
    for file in skipped:
        say(f"  {file}")


@with_decoding
def evaluate(
    model: Annotated[str, typer.Argument(help="A bundled name or a model folder.")],
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of images, or of scenes for a vision-language model.", show_default="by kind of model"
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Seed of the choice of images and of sampling.", show_default="0"),
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="For a vision-language model: rows and columns of 96 px tiles in a scene.", show_default="2x2"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of images instead of the emoji set.", show_default=False)
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="With --data: a vision model whose features the Frechet distance uses.", show_default="the tokenizer's"
        ),
    ] = None,
    decoding: str | None = None,
    options: dict | None = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model on images that it was not trained on."""
    from studio.evaluation import evaluate as measure

    quiet_libraries()
    chosen = given(decoding, **(options or {}))
    check_given(**chosen)
    is_plain = decoding is None and len(chosen) == 1
    how = None if is_plain else lambda pipe: decoding_of(**named(pipe=pipe, **chosen))
    shape = None if tiles is None else parsed_tiles(tiles)
    result = measure(
        model, samples=samples, seed=seed, tiles=shape, device=device, decoding=how, shared=True, data=data,
        features=features,
    )  # fmt: skip
    emit(result)
    for name, value in _flat(result):
        say(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")


def _flat(result, before=""):
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield f"{before}{name}", value
