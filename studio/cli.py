"""The `studio` command: subcommands, and mistakes reported in one sentence.

Every command parses its options, calls the public API as a user would, and prints. Heavy libraries are imported inside
the commands, so that `studio --help` answers at once.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from studio import __version__
from studio.commands import bench, bench_quality, convert, data, space
from studio.commands.analyze import analyze
from studio.commands.ask import ask
from studio.commands.edit import edit
from studio.commands.generate import generate
from studio.commands.info import doctor, models, ui
from studio.commands.pull import pull
from studio.commands.push import push
from studio.commands.serve import bench_serve, serve
from studio.commands.tokenize import detokenize, rate_distortion, tokenize
from studio.commands.train import evaluate, train
from studio.console import (
    OutputError,
    complain,
    emit_error,
    only_json_on_stdout,
    open_streams,
    say,
    warn,
    writing_stdout,
)
from studio.errors import StudioError
from studio.processes import launch_problem

app = typer.Typer(
    name="studio",
    help="Generate and understand images with visual tokens.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="The Fluent Emoji data set, and scenes made of it.", rich_markup_mode=None)
bench_app = typer.Typer(help="Measure speed and quality on this machine.", rich_markup_mode=None)
convert_app = typer.Typer(help="Convert published checkpoints to model folders.", rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")
space_app = typer.Typer(help="Build or push the app as a Hugging Face Space.", rich_markup_mode=None)
app.add_typer(space_app, name="space")


_BROKEN_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE ended


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit with 0, or with 2 and one sentence on stderr for a mistake of the user."""
    open_streams()
    # PyTorch then takes large blocks of memory in huge pages: on Linux a training step on a CPU is faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            with writing_stdout():
                code = _run(arguments)
        elif "--json" in arguments:
            with only_json_on_stdout():
                code = _run(arguments)
        else:
            code = _run(arguments)
    except OutputError as error:
        is_gone = isinstance(error.__cause__, BrokenPipeError)
        code = _BROKEN_PIPE if is_gone else _fail(str(error), 2)
    sys.exit(code)


def _run(arguments):
    if problem := launch_problem():
        warn(problem)
    try:
        return app(arguments or ["--help"], prog_name="studio", standalone_mode=False) or 0
    except OutputError:
        raise
    except StudioError as error:
        return _fail(str(error), 2)
    except typer.Abort:
        return _fail("Stopped.", 130)
    except typer.TyperException as error:
        return _fail(getattr(error, "format_message", error.__str__)(), 2)
    except KeyboardInterrupt:
        return _fail("Stopped.", 130)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        return _fail("There is not enough memory for this: choose a smaller model, batch or size.", 2)


def _lacks_memory(error):
    """Whether Python, PyTorch on a CPU, or PyTorch on another device could not get memory."""
    names = "MemoryError", "OutOfMemoryError"
    return type(error).__name__ in names or "can't allocate memory" in str(error)


def _fail(sentence, code):
    complain(sentence)
    emit_error(" ".join(sentence.split()))
    return code


def _version(wanted: bool):
    if wanted:
        say(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


command: Callable[..., None]
for command in (
    generate,
    edit,
    tokenize,
    detokenize,
    ask,
    train,
    evaluate,
    analyze,
    pull,
    push,
    models,
    doctor,
    ui,
    serve,
):
    app.command()(command)
for command in (data.build, data.scene):
    data_app.command()(command)
for command in (space.build, space.push):
    space_app.command()(command)
for command in (
    bench.decoding,
    bench.pruning,
    bench.verify,
    bench.cost,
    bench.windows,
    bench.contention,
    bench.mar,
    bench.cspd,
    bench_quality.residual,
    bench_quality.editing,
    bench_quality.tokenizers,
    bench_quality.guidance,
    bench_quality.leakage,
):
    bench_app.command()(command)
bench_app.command("all")(bench.everything)
bench_app.command("fourier-head")(bench_quality.fourier_head)
bench_app.command("rate-distortion")(rate_distortion)
bench_app.command("serve")(bench_serve)
for command in (
    convert.llamagen_vq,
    convert.llamagen_c2i,
    convert.llamagen_t2i,
    convert.rq_vae,
    convert.rq_transformer,
    convert.one_d_piece,
    convert.lantern_drafter,
    convert.distilled,
    convert.mar,
    convert.mar_vae,
    convert.token_bridge,
):
    convert_app.command()(command)


if __name__ == "__main__":
    main()
