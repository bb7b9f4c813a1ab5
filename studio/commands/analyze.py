"""`studio analyze`."""

from pathlib import Path
from typing import Annotated

import typer

from studio.commands.options import Device, Json
from studio.commands.outputs import check_figure, save_figure
from studio.console import emit, quiet_libraries, say

_SHOWN = (
    "n",
    "codes_used",
    "entropy",
    "zipf",
    "heaps",
    "distinct2",
    "lzma",
    "unigram_bits",
    "bigram_bits",
    "mi_right",
    "mi_down",
    "mi_far",
)


def analyze(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Image tokenizers or pipelines: names or folders.",
            show_default="all bundled tokenizers",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of images in place of the emoji set.", show_default=False)
    ] = None,
    images: Annotated[int, typer.Option(min=10, max=100_000, help="How many images.")] = 600,
    grammar: Annotated[
        bool, typer.Option("--grammar", help="Build the re-pair grammar too, which takes longer.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the controls and of sampled images.")] = 0,
    figure: Annotated[
        Path | None, typer.Option(help="Write frequency over rank as an SVG.", show_default=False)
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Linguistic statistics of image tokens (frequency, entropy, mutual information), beside controls.

    The controls are shuffled and uniform tokens. A pipeline has the tokens of images that it samples, as many as asked
    for, beside those of its tokenizer.
    """
    from studio.bench.chart import Series, chart
    from studio.bench.report import records_table
    from studio.checkpoints.bundled import bundled_names
    from studio.evaluation.token_grids import rank_frequencies, token_grids
    from studio.evaluation.token_statistics import analyze_tokens

    quiet_libraries()
    check_figure(figure)
    grids = [
        grid
        for name in models or bundled_names("tokenizer")
        for grid in token_grids(name, data=data, images=images, seed=seed, device=device)
    ]
    rows = [row for grid in grids for row in analyze_tokens(grid, seed=seed, grammar=grammar)]
    emit({"rows": rows})
    columns = ("name", "control", *_SHOWN, *(("grammar",) if grammar else ()))
    say(records_table([{name: row[name] for name in columns} for row in rows]))
    series = [Series(grid.name, tuple(rank_frequencies(grid))) for grid in grids]
    save_figure(
        figure, lambda: chart("Tokens by rank", "rank", "log10 of occurrences a thousand tokens", series, log_x=True)
    )
