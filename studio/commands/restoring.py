"""`studio bench tokenizers`."""

from typing import Annotated

import typer

from studio.commands.options import Device, Json, Seed
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError


def bench_tokenizers(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A bundled name or model folder; give it again for more.", show_default="bundled tokenizers"),
    ] = None,
    samples: Annotated[int, typer.Option(min=65, help="Held-out images.")] = 200,
    perturbation: Annotated[
        list[str] | None,
        typer.Option(
            help="How tokens go wrong, ALPHA:DELTA: this share of them, to any of so many nearest codes; give it again "
            "for more.",
            show_default="0.1:2, 0.1:8, 0.5:2, 0.5:8",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare tokenizers: size, restoration, speed, and what wrong tokens do."""
    from studio.bench.report import records_table
    from studio.bench.tokenizers import bench_tokenizers as measure
    from studio.evaluation.robustness import GRID

    quiet_libraries()
    grid = tuple(_perturbation(text) for text in perturbation) if perturbation else GRID
    result = measure(model or None, samples=samples, seed=seed, grid=grid, device=device)
    emit(result)
    told = ", ".join(f"{each['alpha']}:{each['delta']}" for each in result["perturbations"])
    say(f"{result['samples']} images; robustness is the mean Frechet distance with wrong tokens at {told}")
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
        raise StudioError(f"Write a perturbation as ALPHA:DELTA, such as 0.5:8, not {text!r}.") from error
    return Perturbation(*numbers)
