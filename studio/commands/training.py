"""`studio train` and `studio evaluate`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from studio.commands.decodings import (
    Confidence,
    ConfidenceTemperature,
    Coupling,
    Decoding,
    Delta,
    DiffusionSteps,
    Drafts,
    DraftSteps,
    InnerTemperature,
    Mode,
    Neighbours,
    Prefill,
    Ratio,
    Schedule,
    Steps,
    TeacherSteps,
    Window,
    check_given,
    decoding_of,
    given,
    named,
)
from studio.commands.options import Device, Json, Seed, number, parsed_tiles
from studio.console import emit, quiet_libraries, say
from studio.training.recipes import RECIPES, run


def train(
    name: Annotated[str, typer.Argument(help=f"{', '.join(RECIPES)}.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/NAME")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    init_from: Annotated[
        str | None, typer.Option(help="Start from these weights: a bundled name or a folder.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default="the recipe's")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures per step.", show_default="the recipe's")
    ] = None,
    learning_rate: Annotated[float | None, number(help="Peak learning rate.", min=0)] = None,
    as_json: Json = False,
):
    """Train a bundled model anew, or go on training one."""
    quiet_libraries()
    result = run(
        name,
        out=out,
        seed=seed,
        resume=resume,
        init_from=init_from,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        command=shlex.join(["studio", *(word for word in sys.argv[1:] if word != "--resume")]),
    )
    emit(result)
    for key, value in result.items():
        say(f"{key:12} {value}")


def evaluate(
    model: Annotated[str, typer.Argument(help="A bundled name or a model folder.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many pictures to measure.", show_default="the model's own protocol")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Chooses and draws the pictures.", show_default="0")
    ] = None,
    tiles: Annotated[
        str | None, typer.Option(help="Of a reader's scenes: rows and columns of 96 px tiles.", show_default="2x2")
    ] = None,
    decoding: Decoding = None,
    delta: Delta = None,
    neighbours: Neighbours = None,
    ratio: Ratio = None,
    drafts: Drafts = None,
    window: Window = None,
    coupling: Coupling = None,
    steps: Steps = None,
    teacher_steps: TeacherSteps = None,
    mode: Mode = None,
    diffusion_steps: DiffusionSteps = None,
    prefill: Prefill = None,
    draft_steps: DraftSteps = None,
    inner_temperature: InnerTemperature = None,
    schedule: Schedule = None,
    confidence: Confidence = None,
    confidence_temperature: ConfidenceTemperature = None,
    device: Device = None,
    as_json: Json = False,
):
    """Measure a model on pictures it was not trained with."""
    from studio.evaluation import evaluate as measure

    quiet_libraries()
    chosen = given(
        decoding,
        delta=delta,
        neighbours=neighbours,
        ratio=ratio,
        drafts=drafts,
        window=window,
        coupling=coupling,
        steps=steps,
        teacher_steps=teacher_steps,
        mode=mode,
        diffusion_steps=diffusion_steps,
        prefill=prefill,
        draft_steps=draft_steps,
        inner_temperature=inner_temperature,
        schedule=schedule,
        confidence=confidence,
        confidence_temperature=confidence_temperature,
    )
    check_given(**chosen)
    is_plain = decoding is None and len(chosen) == 1
    how = None if is_plain else lambda pipe: decoding_of(**named(pipe=pipe, **chosen))
    shape = None if tiles is None else parsed_tiles(tiles)
    result = measure(model, samples=samples, seed=seed, tiles=shape, device=device, decoding=how, shared=True)
    emit(result)
    for name, value in _flat(result):
        say(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")


def _flat(result, before=""):
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield f"{before}{name}", value
