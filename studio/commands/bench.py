"""`studio bench`: a function for each benchmark of speed, and all tables of the documents."""

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.commands.options import Device, Json, number
from studio.commands.outputs import check_figure, save_figure
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError


def decoding(
    random: Annotated[
        str | None,
        typer.Option(
            help="Time random weights of this size against a reference sampler: "
            "dim=384,layers=8,heads=6,vocab=4096,tokens=256.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Compare the decodings of this model: a bundled name or a folder.", show_default="emoji-ar"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--decoding",
            help="With a model: time this decoding and plain decoding; repeat for more.",
            show_default="all",
        ),
    ] = None,
    guidance: Annotated[float | None, number(help="With --random: guidance scale (1 = off).", show_default="4")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batch size; repeat for more rows.", show_default="1; 1 and 8 with a model"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, ...; repeat for more rows.", show_default="float32"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="With a model: measure speed only and take the quality from the recorded full run."
        ),
    ] = False,
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="With a model: store the rows on this machine for `studio generate --decoding auto`."
        ),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="With a model: write a chart of quality over speed to this SVG file.", show_default=False),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare the decodings of a model in speed and quality, or time random weights against a reference sampler."""
    if random is not None:
        with_model = {"--model": model, "--decoding": only, "--quick": quick, "--save": save, "--figure": figure}
        if wrong := [flag for flag, value in with_model.items() if value]:
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
        say_rows(result["rows"])
        return
    if guidance is not None:
        raise StudioError("--guidance belongs to --random: a model is sampled with its default guidance scale.")
    if only and save:
        raise StudioError("--save stores the rows of all decodings: leave --decoding out.")
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
        list[str] | None, typer.Option(help="A pruning method; repeat for more.", show_default="all")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure this model, emoji-vlm or a folder of the same kind: seconds, memory and exact answers.",
            show_default=False,
        ),
    ] = None,
    after_layer: Annotated[
        int | None,
        typer.Option(min=1, help="With --model: prune after this layer of the language model.", show_default=False),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="With --model: fraction of the tokens to keep; repeat for more.", show_default="0.5 0.2 0.1 0.05"
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            help="With --model: tokens that the vision tower merges in its first layer, the second, ..., such as "
            "56,28,14, or diffrate, or diffrate:36+10,28+8 (merged and pruned); repeat for more.",
            show_default=False,
        ),
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, help="With --model: number of scenes.", show_default="100")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Time whole answers for this many prompts at once; repeat for more.", show_default="1"
        ),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(help="Time whole answers with sdpa, eager or flash; repeat for more.", show_default="sdpa"),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            help="Time random weights of a published size: smolvlm-256m, qwen2.5-vl-3b, llava-1.5-7b or llava-next-7b.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of each answer that is timed.", show_default="64")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Runs of each setting that is timed.", show_default="10")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="With --model: write a chart of accuracy over kept tokens to this SVG file.", show_default=False
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time pruning methods against reference implementations, or measure a model with pruned tokens."""
    chosen: dict[str, Any] = {"methods": tuple(method)} if method else {}
    timed = {"--batch": batch, "--attention": attention, "--random": random}
    more = {"--new-tokens": new_tokens, "--repeats": repeats}
    if any(value for value in timed.values()):
        answered = {"--scenes": scenes, "--merge": merge or None, "--figure": figure}
        if wrong := [flag for flag, value in answered.items() if value is not None]:
            raise StudioError(f"{' and '.join(wrong)} measures answers, which {', '.join(timed)} do not: leave it out.")
        if model is not None and random is not None:
            raise StudioError("--model and --random exclude each other: leave one of them out.")
        from studio.bench.pruning_speed import bench_pruning_speed

        quiet_libraries()
        several: dict[str, Any] = {"keeps": keep, "batches": batch, "attentions": attention}
        given: dict[str, Any] = {name: tuple(value) for name, value in several.items() if value}
        numbers = {"new_tokens": new_tokens, "repeats": repeats, "after_layer": after_layer}
        given |= {name: value for name, value in numbers.items() if value is not None}
        result = bench_pruning_speed(model or "emoji-vlm", random=random, device=device, **chosen, **given)
        emit(result)
        say_rows([{**row, "layer_bytes": max(row["layer_bytes"])} for row in result["rows"]])
        for name, reason in result["left_out"].items():
            say(f"Not timed: {name}, because {reason}")
        return
    if wrong := [flag for flag, value in more.items() if value is not None]:
        raise StudioError(f"{' and '.join(wrong)} belongs to whole answers: add --batch 1, or leave it out.")
    if model is None:
        with_model: dict[str, Any] = {"--after-layer": after_layer, "--keep": keep or None, "--merge": merge or None}
        with_model |= {"--scenes": scenes, "--figure": figure}
        if wrong := [flag for flag, value in with_model.items() if value is not None]:
            raise StudioError(f"{' and '.join(wrong)} belongs to --model: add --model emoji-vlm, or leave it out.")
        from studio.bench.pruning import bench_pruning as measure

        result = measure(device=device or "cpu", **chosen)
        emit(result)
        say_rows(result["rows"])
        return
    check_figure(figure)
    from studio.bench.reading import bench_reading, reading_chart, reading_table

    quiet_libraries()
    asked: dict[str, Any] = {"scenes": scenes} if scenes else {}
    if keep:
        asked["keeps"] = tuple(keep)
    if after_layer is not None:
        asked["after_layer"] = after_layer
    if merge:
        asked["merges"] = tuple(merge)
    result = bench_reading(model, device=device, **chosen, **asked)
    save_figure(figure, lambda: reading_chart(result["rows"]))
    emit(result)
    say(reading_table(result["rows"]))


def verify(
    vocab: Annotated[int, typer.Option(min=2, help="Codebook size.")] = 16384,
    nodes: Annotated[int, typer.Option(min=2, help="Nodes of the draft tree.")] = 59,
    k: Annotated[int, typer.Option(min=1, help="Nearest codes in a neighbourhood.")] = 1000,
    as_json: Json = False,
) -> None:
    """Time LANTERN's verification of a draft tree against a reference loop."""
    from studio.bench.verify import bench_verify

    result = bench_verify(vocab=vocab, nodes=nodes, k=k)
    emit(result)
    say_rows([result])


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
    """Time calls for one and for several tokens: the accepted tokens per call at which speculation breaks even."""
    if model is not None and preset is not None:
        raise StudioError("--model and --preset exclude each other: leave one of them out.")
    from studio.bench.cost import bench_cost

    quiet_libraries()
    result = bench_cost(model or "emoji-ar", preset=preset, device=device)
    emit(result)
    say_rows(result["rows"])


def windows(
    model: Annotated[
        str, typer.Option(help="A bundled name or model folder with a text-conditional LlamaGen.")
    ] = "emoji-ar",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time Jacobi decoding by window, beside windows chosen by a search that knows the right guesses."""
    from studio.bench.windows import bench_windows

    quiet_libraries()
    result = bench_windows(model, device=device)
    emit(result)
    say_rows(result["rows"])


def contention(
    model: Annotated[str, typer.Option(help="A bundled name or model folder that samples.")] = "emoji-ar",
    as_json: Json = False,
) -> None:
    """Time one image on the CPU, with the machine idle and with one busy process per core."""
    from studio.bench.contention import bench_contention

    quiet_libraries()
    result = bench_contention(model)
    emit(result)
    say_rows([result])


def mar(
    random: Annotated[
        str,
        typer.Option(
            help="Random weights of this size: dim=256,depth=6,heads=8,head_width=512,head_depth=4,tokens=64,steps=16,"
            "diffusion_steps=25, or some of these."
        ),
    ] = "",
    guidance: Annotated[float, number(help="Guidance scale (1 = off).", show_default=True)] = 3.0,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 2,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time masked autoregressive sampling of continuous tokens against a reference sampler."""
    from studio.bench.mar import bench_mar as measure

    result = measure(random=random, guidance_scale=guidance, batch=batch, device=device or "cpu")
    emit(result)
    say_rows([result])


def cspd(
    model: Annotated[str, typer.Option(help="A MAR with a drafter: a bundled name or a folder.")] = "emoji-mar",
    published: Annotated[
        list[str] | None,
        typer.Option(
            help="Add random weights of a published size, mar-l or mar-h, with mar-b as the drafter; repeat for more.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time the parts of continuous speculative decoding: what it gains at best, at these sizes, on this machine."""
    from studio.bench.cspd import bench_cspd

    quiet_libraries()
    result = bench_cspd(model, published=tuple(published or ()), device=device)
    emit(result)
    say_rows(result["rows"])


def everything(
    documents: Annotated[
        list[Path] | None,
        typer.Argument(help="Markdown files.", show_default="README.md and docs/*.md"),
    ] = None,
    only: Annotated[str, typer.Option(help="Only commands that contain this, such as pruning.")] = "",
    as_json: Json = False,
) -> None:
    """Run the commands of the tables in documents again and update the tables."""
    from studio.bench.report import regenerate

    chosen = documents or [path for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if path.is_file()]
    if not chosen:
        raise StudioError("There is no README.md here: change to the repository, or name documents.")
    commands = regenerate(chosen, only)
    emit({"commands": commands})
    for command in commands:
        say(command)


def say_rows(rows: list[dict]) -> None:
    """Prints records as a table."""
    from studio.bench.report import records_table

    say(records_table(rows))
