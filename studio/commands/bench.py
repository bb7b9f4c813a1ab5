"""`studio bench`."""

from pathlib import Path
from typing import Annotated

import typer

from studio.commands.figures import check_figure, save_figure
from studio.commands.options import Device, Json, number
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError


def decoding(
    random: Annotated[
        str | None,
        typer.Option(
            help="Time random weights of this size beside a textbook sampler: "
            "dim=384,layers=8,heads=6,vocab=4096,tokens=256.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Compare the decodings of a bundled name or model folder.", show_default="emoji-ar"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--decoding",
            help="Of a model: time this one beside plain decoding; give it again for more.",
            show_default="all",
        ),
    ] = None,
    guidance: Annotated[float | None, number(help="With --random: guidance scale (1 = off).", show_default="4")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images at a time; give it again for more rows.", show_default="1, and 8 of a model"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, ...; give it again for more rows.", show_default="float32"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Of a model: only time, with the quality of the recorded full run.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Of a model: keep the rows here, for `studio generate --decoding auto`.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Of a model: write quality over speed as this SVG file.", show_default=False)
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time sampling tokens: what each decoding of a model buys, or how random weights do beside a textbook sampler."""
    if random is not None:
        of_models = {"--model": model, "--decoding": only, "--quick": quick, "--save": save, "--figure": figure}
        if wrong := [flag for flag, value in of_models.items() if value]:
            raise StudioError(f"{' and '.join(wrong)} cannot go with --random: leave one side out.")
        from studio.bench.decoding import bench_decoding as measure

        result = measure(
            random=random,
            guidance_scale=guidance,
            batch_sizes=batch or [1],
            dtypes=dtype or ["float32"],
            device=device,
        )
        emit(result)
        _say_rows(result["rows"])
        return
    if guidance is not None:
        raise StudioError("--guidance belongs to --random: a model is sampled with its own.")
    if only and save:
        raise StudioError("--save keeps what is known of all decodings: leave --decoding out.")
    check_figure(figure)
    from studio.bench.tradeoff import bench_tradeoff, tradeoff_chart, tradeoff_table

    sizes = tuple(batch or (1, 8))
    result = bench_tradeoff(
        model or "emoji-ar",
        only=tuple(only or ()),
        quick=quick,
        save=save,
        batch_sizes=sizes,
        dtypes=tuple(dtype or ["float32"]),
        device=device,
    )
    save_figure(figure, lambda: tradeoff_chart(result["rows"], sizes[0]))
    emit(result)
    say(tradeoff_table(result["rows"]))
    for name, reason in result["left_out"].items():
        say(f"Not timed: {name}, because {reason}.")


def pruning(
    method: Annotated[
        list[str] | None, typer.Option(help="A pruning method; give it again for more.", show_default="all")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Ask this model, emoji-vlm or a folder of its training: seconds, memory and exact answers.",
            show_default=False,
        ),
    ] = None,
    after_layer: Annotated[
        int | None,
        typer.Option(min=1, help="With --model: prune behind this layer of its language model.", show_default=False),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="With --model: share of the tokens to keep; give it again for more.", show_default="0.5 0.2 0.1 0.05"
        ),
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, help="With --model: scenes to ask about.", show_default="100")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="With --model: write answers over kept tokens as this SVG file.", show_default=False),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time how visual tokens are chosen, beside a plain textbook of each method, or what that buys a model."""
    chosen = {"methods": tuple(method)} if method else {}
    if model is None:
        of_models = {"--after-layer": after_layer, "--keep": keep or None, "--scenes": scenes, "--figure": figure}
        if wrong := [flag for flag, value in of_models.items() if value is not None]:
            raise StudioError(f"{' and '.join(wrong)} belongs to --model: add --model emoji-vlm, or leave it out.")
        from studio.bench.pruning import bench_pruning as measure

        result = measure(device=device or "cpu", **chosen)
        emit(result)
        _say_rows(result["rows"])
        return
    check_figure(figure)
    from studio.bench.reading import bench_reading, reading_chart, reading_table

    quiet_libraries()
    asked = {"scenes": scenes} if scenes else {}
    if keep:
        asked["keeps"] = tuple(keep)
    if after_layer is not None:
        asked["after_layer"] = after_layer
    result = bench_reading(model, device=device, **chosen, **asked)
    save_figure(figure, lambda: reading_chart(result["rows"]))
    emit(result)
    say(reading_table(result["rows"]))


def verify(
    vocab: Annotated[int, typer.Option(min=2, help="Codes.")] = 16384,
    nodes: Annotated[int, typer.Option(min=2, help="Nodes of the draft tree.")] = 59,
    k: Annotated[int, typer.Option(min=1, help="Similar codes that count.")] = 1000,
    as_json: Json = False,
) -> None:
    """Time LANTERN's verification of a draft tree, beside a plain textbook loop."""
    from studio.bench.verify import bench_verify

    result = bench_verify(vocab=vocab, nodes=nodes, k=k)
    emit(result)
    _say_rows([result])


def cost(
    model: Annotated[
        str | None, typer.Option(help="A bundled name or model folder with a LlamaGen.", show_default="emoji-ar")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a published size instead: llamagen-b, llamagen-l, llamagen-xl or llamagen-3b.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time a step and calls for several positions: the tokens a call at which speculation breaks even here."""
    if model is not None and preset is not None:
        raise StudioError("--model and --preset exclude each other: leave one of them out.")
    from studio.bench.cost import bench_cost

    quiet_libraries()
    result = bench_cost(model or "emoji-ar", preset=preset, device=device)
    emit(result)
    _say_rows(result["rows"])


def contention(
    model: Annotated[str, typer.Option(help="A bundled name or model folder that samples.")] = "emoji-ar",
    as_json: Json = False,
) -> None:
    """Time one image on the CPU with the machine idle, and with a busy process for each core."""
    from studio.bench.contention import bench_contention

    quiet_libraries()
    result = bench_contention(model)
    emit(result)
    _say_rows([result])


def mar(
    random: Annotated[
        str,
        typer.Option(
            help="Random weights of this size: dim=256,depth=6,heads=8,head_width=512,head_depth=4,tokens=64,steps=16,"
            "diffusion_steps=25, or some of these."
        ),
    ] = "",
    guidance: Annotated[float, number(help="Guidance scale (1 = off).", show_default=True)] = 3.0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 2,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time masked autoregressive sampling of continuous tokens, beside a plain textbook sampler."""
    from studio.bench.mar import bench_mar as measure

    result = measure(random=random, guidance_scale=guidance, batch=batch, device=device or "cpu")
    emit(result)
    _say_rows([result])


def residual(
    model: Annotated[
        str, typer.Option(help="A ResGen that samples from words: a bundled name or a folder.")
    ] = "emoji-resgen",
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Calls of the model; give it again for more.", show_default="1, 2, 4, ..., 32"),
    ] = None,
    samples: Annotated[int, typer.Option(min=65, help="Images for each number of calls.")] = 500,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Judge images of a ResGen over the number of calls and the levels that are decoded."""
    from studio.bench.residual import STEPS, bench_residual, residual_table

    result = bench_residual(model, steps=tuple(steps or STEPS), samples=samples, device=device)
    emit(result)
    say(residual_table(result["rows"]))


def everything(
    documents: Annotated[
        list[Path] | None,
        typer.Argument(help="Markdown files.", show_default="README.md and docs/*.md"),
    ] = None,
    only: Annotated[str, typer.Option(help="Only commands that hold this, such as pruning.")] = "",
    as_json: Json = False,
) -> None:
    """Measure anew what documents show: runs the command beside every table, and writes there what it prints."""
    from studio.bench.report import regenerate

    chosen = documents or [path for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if path.is_file()]
    if not chosen:
        raise StudioError("There is no README.md here: change to the repository, or name documents.")
    commands = regenerate(chosen, only)
    emit({"commands": commands})
    for command in commands:
        say(command)


def _say_rows(rows):
    from studio.bench.report import records_table

    say(records_table(rows))
