"""The `studio` command. Every command parses its options, calls the public API as a user would, and prints.

Heavy libraries are imported inside the commands, so that `studio --help` answers at once.
"""

import math
import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from studio import __version__
from studio.console import complain, emit, only_json_on_stdout, quiet_libraries, say, warn
from studio.errors import StudioError

app = typer.Typer(
    name="studio",
    help="Pictures from words with token-based image models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="The Fluent Emoji set.", rich_markup_mode=None)
bench_app = typer.Typer(help="Measure speed on this machine.", rich_markup_mode=None)
convert_app = typer.Typer(help="Turn published checkpoints into model folders.", rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")


def main(argv=None):
    """Run the command line; exits with 0, or with 2 and one sentence on stderr for a mistake the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--json" in arguments and not {"-h", "--help"} & set(arguments):
        with only_json_on_stdout():
            code = _run(arguments)
    else:
        code = _run(arguments)
    sys.exit(code)


def _run(arguments):
    try:
        return app(arguments or ["--help"], prog_name="studio", standalone_mode=False) or 0
    except StudioError as error:
        return _fail(str(error), 2)
    except typer.Abort:
        return _fail("Stopped.", 130)
    except typer.TyperException as error:
        return _fail(getattr(error, "format_message", error.__str__)(), 2)
    except KeyboardInterrupt:
        return _fail("Stopped.", 130)


def _fail(sentence, code):
    complain(sentence)
    emit({"error": " ".join(sentence.split())})
    return code


def _finite(value: float | None):
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _version(wanted: bool):
    if wanted:
        say(__version__)
        raise typer.Exit()


def _number(*names, help, show_default=False, **limits):
    return typer.Option(*names, help=help, callback=_finite, show_default=show_default, **limits)


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps.", show_default="cuda if there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16, or int8 weights on a CPU.", show_default="by device"),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Decides every random choice.")]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    pass


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='What to draw, such as "a red apple".', show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="A bundled name, a model folder or a Hub id (owner/name).")] = "emoji-ar",
    num_images: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 1,
    class_label: Annotated[
        int | None, typer.Option(min=0, help="The class to draw, for class-conditional models.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="Seed of the first picture; the next use seed+1, ...", show_default="drawn"
        ),
    ] = None,
    guidance: Annotated[
        float | None, _number(help="How closely to follow the prompt (1 = off; the model's own default).")
    ] = None,
    cfg_interval: Annotated[int, typer.Option(min=-1, help="Last token that guidance steers (-1: all of them).")] = -1,
    temperature: Annotated[float | None, _number(help="Randomness of each token (1 = as the model predicts).")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw from the k likeliest tokens (0: all).", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, _number(help="Draw from the likeliest tokens that make up this fraction (0-1).")
    ] = None,
    decoding: Annotated[
        str, typer.Option(help="How tokens are drawn: ar, speculative (same law) or lantern (relaxed).")
    ] = "ar",
    delta: Annotated[
        float | None, _number(help="Lantern: largest total variation a token, 0 to 1.", show_default="0.1")
    ] = None,
    neighbours: Annotated[
        int | None, typer.Option(min=1, help="Lantern: how many similar codes count.", show_default="1000")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path, typer.Option(help="A file if it ends in .png (name-0.png, ... for several), else a folder.")
    ] = Path("out"),
    sheet: Annotated[bool, typer.Option("--sheet", help="Also write all pictures as one sheet.")] = False,
    as_json: Json = False,
):
    """Draw pictures from words."""
    settings = {
        "guidance_scale": guidance,
        "cfg_interval": cfg_interval,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if (prompt is None) == (class_label is None):
        raise StudioError(
            'Say what to draw: a prompt such as "a red apple", or --class-label for a class-conditional model.'
        )
    chosen = {"delta": delta, "neighbours": neighbours}
    chosen = {"name": decoding, **{name: value for name, value in chosen.items() if value is not None}}
    if chosen.keys() & {"delta", "neighbours"} and decoding != "lantern":
        raise StudioError("--delta and --neighbours belong to --decoding lantern: add it, or leave them out.")
    if dtype == "int8" and decoding != "ar":
        raise StudioError("--dtype int8 goes with --decoding ar only.")
    _generate(prompt, class_label, model, num_images, seed, settings, chosen, device, dtype, out, sheet)


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="A vision-language model of transformers: a folder or Hub id.")],
    prune: Annotated[
        str | None, typer.Option(help="divprune, hired, globalcom2, random or uniform.", show_default="keep all tokens")
    ] = None,
    keep: Annotated[
        float | None, _number(help="Share of the picture's tokens to keep, with --prune.", show_default="0.2")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
):
    """Ask about a picture, with as few visual tokens as you like."""
    from studio import load
    from studio.pictures import open_picture

    if keep is not None and prune is None:
        raise StudioError("--keep needs a method: add --prune divprune, or leave it out.")
    picture = open_picture(image)
    quiet_libraries()
    pipe = load(model, device=device, dtype=dtype)
    if not hasattr(pipe, "processor"):
        raise StudioError(f"{model} reads no pictures: name a vision-language model of transformers.")
    share = 0.2 if keep is None else keep
    answer = pipe(picture, question, prune=prune, keep=share, max_new_tokens=max_new_tokens)
    emit(
        {
            "answer": answer.answer,
            "visual_tokens": answer.visual_tokens,
            "kept_tokens": answer.kept_tokens,
            "seconds": answer.seconds,
            "cache_bytes": answer.cache_bytes,
        }
    )
    say(answer.answer)
    spent = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in answer.seconds.items())
    say(f"{answer.kept_tokens} of {answer.visual_tokens} visual tokens; seconds: {spent}")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="emoji-vq, emoji-ar or emoji-judge.")],
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
    learning_rate: Annotated[float | None, _number(help="Peak learning rate.", min=0)] = None,
    as_json: Json = False,
):
    """Train a bundled model anew, or go on training one."""
    from studio.training.recipes import run

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


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A bundled name or a model folder.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many pictures to measure.", show_default="the model's own protocol")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Chooses and draws the pictures.", show_default="0")
    ] = None,
    device: Device = None,
    as_json: Json = False,
):
    """Measure a model on pictures it was not trained with."""
    from studio.evaluation import evaluate as measure

    quiet_libraries()
    result = measure(model, samples=samples, seed=seed, device=device)
    emit(result)
    for name, value in result.items():
        say(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")


@app.command()
def models(as_json: Json = False):
    """List the bundled models."""
    from studio.doctor import list_models

    rows = list_models()
    emit({"models": rows})
    for row in rows:
        say(f"{row['name']:12} {row['kind']:10} {row['state']:10} {row['summary']}")


@app.command()
def doctor(as_json: Json = False):
    """Check this installation: device, versions, bundled weights."""
    from studio.doctor import examine

    report = examine()
    emit(report)
    for name, value in {**report["versions"], "device": report["device"], "threads": report["threads"]}.items():
        say(f"{name:24} {value}")
    for row in report["models"]:
        say(f"{row['name']:24} {row['state']}")
    if not report["ok"]:
        raise StudioError("Some bundled weights are missing or damaged: install Studio again.")


@app.command()
def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 shows the app to the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
):
    """Open the app in a browser."""
    from studio.ui.app import launch

    launch(host=host, port=port)


@data_app.command("build")
def data_build(
    out: Annotated[Path, typer.Argument(help="The archive to write.")] = Path("studio/data/fluent-emoji.zip"),
    source: Annotated[
        Path | None, typer.Option(help="Folder with the npm packages instead of fetching them.", show_default=False)
    ] = None,
    as_json: Json = False,
):
    """Make the picture archive from its npm packages."""
    from studio.data.build import build_archive

    concepts = build_archive(out, source)
    emit({"path": str(out), "concepts": concepts})
    say(f"{concepts} concepts: {out}")


@bench_app.command("decoding")
def bench_decoding(
    random: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this size: dim=384,layers=8,heads=6,vocab=4096,tokens=256.", show_default=False
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="A bundled name or model folder instead.")] = "emoji-ar",
    guidance: Annotated[float | None, _number(help="Guidance scale (1 = off).")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Pictures at a time; give it again for more rows.", show_default="1")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, ...; give it again for more rows.", show_default="float32"),
    ] = None,
    device: Device = None,
    as_json: Json = False,
):
    """Time drawing tokens, beside a plain textbook sampler and the bound that memory sets."""
    from studio.evaluation.bench_decoding import bench_decoding as measure

    result = measure(
        random=random,
        model=model,
        guidance_scale=guidance,
        batch_sizes=batch or [1],
        dtypes=dtype or ["float32"],
        device=device,
    )
    emit(result)
    _say_rows(result["rows"])


@bench_app.command("pruning")
def bench_pruning(
    method: Annotated[
        list[str] | None, typer.Option(help="A pruning method; give it again for more.", show_default="all")
    ] = None,
    device: Device = None,
    as_json: Json = False,
):
    """Time how visual tokens are chosen, beside a plain textbook of each method."""
    from studio.evaluation.bench_pruning import bench_pruning as measure

    chosen = {"methods": method} if method else {}
    result = measure(device=device or "cpu", **chosen)
    emit(result)
    _say_rows(result["rows"])


def _say_rows(rows):
    for row in rows:
        say(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )


Checkpoint = Annotated[Path, typer.Argument(help="The authors' file (.pt, .pth or .safetensors).")]
OutFolder = Annotated[Path, typer.Argument(help="The folder to make.")]
VqFile = Annotated[Path, typer.Option("--tokenizer", help="The authors' VQ file, or a converted folder.")]
Grid = Annotated[int | None, typer.Option("--grid-size", min=1, help="Tokens a side.", show_default="as published")]


@convert_app.command("llamagen-vq")
def convert_vq(checkpoint: Checkpoint, out: OutFolder, as_json: Json = False):
    """LlamaGen's VQ-8 or VQ-16 tokenizer."""
    from studio.checkpoints.llamagen import convert_llamagen_vq

    _converted(convert_llamagen_vq(checkpoint, out))


@convert_app.command("llamagen-c2i")
def convert_c2i(
    checkpoint: Checkpoint, out: OutFolder, tokenizer: VqFile, grid_size: Grid = None, as_json: Json = False
):
    """A class-conditional LlamaGen transformer and its tokenizer."""
    from studio.checkpoints.llamagen import convert_llamagen

    _converted(convert_llamagen(checkpoint, out, "c2i", tokenizer=tokenizer, grid_size=grid_size))


@convert_app.command("llamagen-t2i")
def convert_t2i(
    checkpoint: Checkpoint,
    out: OutFolder,
    tokenizer: VqFile,
    text_encoder: Annotated[Path, typer.Option(help="Folder of the T5 encoder (flan-t5-xl) and its tokenizer.")],
    grid_size: Grid = None,
    as_json: Json = False,
):
    """A text-conditional LlamaGen transformer, its tokenizer and its text encoder."""
    from studio.checkpoints.llamagen import convert_llamagen

    _converted(
        convert_llamagen(checkpoint, out, "t2i", tokenizer=tokenizer, text_encoder=text_encoder, grid_size=grid_size)
    )


def _converted(folder):
    emit({"path": str(folder)})
    say(f"Converted: {folder}")


def _decoding(name, dtype, delta=0.1, neighbours=1000):
    from studio import Autoregressive, Lantern, Speculative

    if name == "ar":
        return Autoregressive(weights="int8" if dtype == "int8" else "auto")
    if name == "speculative":
        return Speculative()
    if name == "lantern":
        return Lantern(k=neighbours, delta=delta)
    raise StudioError(f"--decoding is ar, speculative or lantern, not {name!r}.")


def _generate(prompt, class_label, model, num_images, seed, settings, decoding, device, dtype, out, sheet):
    from studio.saving import make_sheet, plan_paths, png_writer, save_all

    seeds = [(secrets.randbelow(2**31) if seed is None else seed) + index for index in range(num_images)]
    paths, sheet_path = plan_paths(out, prompt or f"class {class_label}", seeds, sheet)

    import torch

    from studio import load
    from studio.checkpoints.vocabulary import prompt_warning

    how = _decoding(dtype=dtype, **decoding)
    quiet_libraries()
    packed = dtype == "int8"
    pipe = load(model, device=device, dtype=None if packed else dtype)
    if not callable(pipe) or not hasattr(pipe, "image_tokenizer"):
        raise StudioError(f"{model} turns pictures into tokens and cannot draw: use a pipeline such as emoji-ar.")
    if warning := prompt_warning(pipe, prompt):
        warn(warning)
    output = pipe(
        prompt,
        class_labels=class_label,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed(each) for each in seeds],
        decoding=how,
        **settings,
    )

    call = {"model": model, "prompt": prompt, "class_label": class_label, "num_images": num_images, **settings}
    call |= {
        "decoding": decoding,
        "device": str(pipe.device),
        "dtype": "int8" if packed else str(pipe.transformer.dtype).removeprefix("torch."),
    }
    writers = {path: png_writer(image, call, each) for path, image, each in zip(paths, output.images, seeds)}
    if sheet_path:
        writers[sheet_path] = png_writer(make_sheet(output.images), call, seeds)
    save_all(writers)

    stats = output.stats
    emit(
        {
            "model": model,
            "decoding": decoding["name"],
            "images": [{"path": str(path), "seed": each} for path, each in zip(paths, seeds)],
            **({"sheet": str(sheet_path)} if sheet_path else {}),
            "tokens": stats.tokens,
            "target_calls": stats.target_calls,
            "mean_accepted_length": stats.mean_accepted_length,
            "seconds": stats.seconds,
        }
    )
    for path, each in zip(paths, seeds):
        say(f"{path}  seed {each}")
    if sheet_path:
        say(f"{sheet_path}  all {num_images}")
    total, decode = stats.seconds["total"], stats.seconds["decode"]
    say(f"{total:.1f} seconds, {stats.tokens} tokens, {stats.tokens / max(decode, 1e-9):.0f} tokens per second")


if __name__ == "__main__":
    main()
