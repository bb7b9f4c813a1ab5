"""`studio bench`: a function for each benchmark of what models make: their images, edits and tokens."""

from typing import Annotated

import typer

from studio.checks import shown
from studio.commands.bench import say_rows
from studio.commands.options import Device, Json, Seed
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError

Generators = Annotated[
    list[str] | None,
    typer.Option("--model", help="A text-conditional pipeline; repeat for more.", show_default="bundled generators"),
]


def residual(
    model: Annotated[str, typer.Option(help="A text-conditional ResGen: a bundled name or a folder.")] = "emoji-resgen",
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Forward passes; repeat for more.", show_default="1, 2, 4, ..., 32"),
    ] = None,
    samples: Annotated[int, typer.Option(min=65, help="Images for each number of steps.")] = 500,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Evaluate images of a ResGen over the number of steps and of decoded levels."""
    from studio.bench.residual import STEPS, bench_residual, residual_table

    result = bench_residual(model, steps=tuple(steps or STEPS), samples=samples, device=device)
    emit(result)
    say(residual_table(result["rows"]))


def fourier_head(
    model: Annotated[str, typer.Option(help="A TokenBridge: a bundled name or a folder.")] = "emoji-bridge",
    frequencies: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Of the Fourier heads, 0 for a linear one; repeat for more.", show_default="0, 12"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1500,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train the head of a TokenBridge anew with linear and with Fourier output layers, and compare them."""
    from studio.bench.fourier_head import FREQUENCIES, bench_fourier_head

    quiet_libraries()
    chosen = tuple(frequencies or FREQUENCIES)
    result = bench_fourier_head(model, frequencies=chosen, steps=steps, seed=seed, device=device)
    emit(result)
    say_rows(result["rows"])


def guidance(
    model: Generators = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Mean guidance scale; repeat for more.", show_default="2, 3"),
    ] = None,
    samples: Annotated[int, typer.Option(min=65, help="Images for each setting.")] = 500,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare constant and rising guidance at the same mean scale."""
    from studio.bench.guidance import SCALES, bench_guidance

    quiet_libraries()
    result = bench_guidance(model or None, scales=scale or SCALES, samples=samples, seed=seed, device=device)
    emit(result)
    say_rows(result["rows"])


def leakage(
    model: Generators = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Count objects that take on the background's colour, with text states as they are and repaired."""
    from studio.bench.leakage import bench_leakage, leakage_tables

    quiet_libraries()
    result = bench_leakage(model or None, seed=seed, device=device)
    emit(result)
    say(leakage_tables(result))


def editing(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A text-conditional pipeline; repeat for more.", show_default="bundled ones with grids"),
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Sheets of which one emoji is redrawn.")] = 200,
    seams: Annotated[int, typer.Option(min=1, help="Images of which seams are measured.")] = 40,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure edits: what the classifier sees in redrawn boxes, what stays, and seams."""
    from studio.bench.editing import MODELS, bench_editing, editing_table

    quiet_libraries()
    result = bench_editing(tuple(model or MODELS), cases=cases, seams=seams, seed=seed, device=device)
    emit(result)
    say(editing_table(result["rows"]))


def tokenizers(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A bundled name or model folder; repeat for more.", show_default="bundled tokenizers"),
    ] = None,
    samples: Annotated[int, typer.Option(min=65, help="Held-out images.")] = 200,
    perturbation: Annotated[
        list[str] | None,
        typer.Option(
            help="ALPHA:DELTA: replace a fraction ALPHA of the tokens by one of DELTA nearest codes; repeat for more.",
            show_default="0.1:2, 0.1:8, 0.5:2, 0.5:8",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare tokenizers in size, reconstruction, speed and robustness to wrong tokens."""
    from studio.bench.report import records_table
    from studio.bench.tokenizers import bench_tokenizers
    from studio.evaluation.robustness import GRID

    quiet_libraries()
    grid = tuple(_perturbation(text) for text in perturbation) if perturbation else GRID
    result = bench_tokenizers(model or None, samples=samples, seed=seed, grid=grid, device=device)
    emit(result)
    settings = ", ".join(f"{each['alpha']}:{each['delta']}" for each in result["perturbations"])
    say(f"{result['samples']} images; robustness is the mean Frechet distance with perturbed tokens at {settings}")
    names = ("tokens", "bits", "psnr", "ssim", "frechet", "robustness", "encode_per_second", "decode_per_second")
    rows = [
        {"model": f"{row['model']} {row['variant']}".strip(), **{name: row[name] for name in names}}
        for row in result["rows"]
    ]
    say(f"\n{records_table(rows)}")


def _perturbation(text):
    from studio.evaluation.robustness import Perturbation

    alpha, _, delta = text.partition(":")
    try:
        numbers = float(alpha), int(delta)
    except ValueError as error:
        raise StudioError(f"Write a perturbation as ALPHA:DELTA, such as 0.5:8, not {shown(text)}.") from error
    return Perturbation(*numbers)
