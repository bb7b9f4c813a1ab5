"""The options that say how tokens are sampled, for every command that samples."""

from typing import Annotated

import typer

from studio.commands.options import number
from studio.console import say, warn
from studio.errors import StudioError

Decoding = Annotated[
    str | None,
    typer.Option(
        "--decoding",
        help="How tokens are generated: ar, jacobi (the same image in fewer calls), exact (the faster of the two), "
        "speculative (same distribution), lantern, lantern++ (relaxed), distilled (a student), auto (the fastest that "
        "was measured here); of a MAR, mar or cspd (a drafter); of a TokenBridge, bridge; of a ResGen, resgen or "
        "first-hitting; of an RQ-Transformer, rq.",
        show_default="exact, mar, bridge, resgen or rq",
    ),
]
Delta = Annotated[
    float | None, number("--delta", help="lantern: largest total variation a token, 0 to 1.", show_default="0.1")
]
Neighbours = Annotated[
    int | None,
    typer.Option(
        "--neighbours", min=1, help="lantern, lantern++: how many similar codes count.", show_default="1000, 10"
    ),
]
Ratio = Annotated[
    float | None,
    number("--ratio", help="lantern++: how many times likelier a token may become, 1 or more.", show_default="5"),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=1,
        help="jacobi: tokens of an image that a call of the model reads.",
        show_default="by measured costs",
    ),
]
Coupling = Annotated[
    str | None,
    typer.Option(
        "--coupling",
        help="jacobi: how guesses are made and tested: seed (the image of ar), none, maximal or gumbel (other images "
        "of the same distribution).",
        show_default="seed",
    ),
]
Drafts = Annotated[
    str | None,
    typer.Option(
        "--drafts",
        help="lantern, lantern++: where drafts come from: own (the model's drafter, or recycled) or jacobi (guesses of "
        "Jacobi decoding).",
        show_default="own",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="distilled: calls of the student; mar, cspd, bridge: of the model, at most one a token; resgen, "
        "first-hitting: at most one a code.",
        show_default="1; the model's own",
    ),
]
TeacherSteps = Annotated[
    int | None,
    typer.Option(
        "--teacher-steps", min=0, help="distilled: tokens that the model itself samples first.", show_default="0"
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        help="cspd: exact (the model's distribution) or relaxed (approximate: another distribution).",
        show_default="exact",
    ),
]
DiffusionSteps = Annotated[
    int | None,
    typer.Option(
        "--diffusion-steps", min=1, help="mar, cspd: steps that denoise a token.", show_default="the model's own"
    ),
]
Prefill = Annotated[
    float | None,
    number("--prefill", help="cspd: share of the steps that the model samples itself first.", show_default="0.05"),
]
DraftSteps = Annotated[
    int | None,
    typer.Option("--draft-steps", min=1, help="cspd, relaxed: steps drafted before a test.", show_default="4"),
]
InnerTemperature = Annotated[
    float | None,
    number("--inner-temperature", help="cspd, relaxed: how forgiving the test is.", show_default="42"),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="resgen, first-hitting: how the number of hidden codes falls: cosine, circle or arccos.",
        show_default="cosine",
    ),
]
Confidence = Annotated[
    str | None,
    typer.Option("--confidence", help="resgen: of a whole cell, or of each level: cell or level.", show_default="cell"),
]
ConfidenceTemperature = Annotated[
    float | None,
    number("--confidence-temperature", help="resgen: noise on what stays first, at the start.", show_default="1"),
]
Tolerance = Annotated[
    float | None,
    number(
        "--tolerance", help="auto: how much of the judge's top-1 accuracy may be lost, 0 to 1.", show_default="0.03"
    ),
]


def given(name, **options):
    """`{"name": ..., and the options that were given}`; None is the usual decoding of whatever model samples."""
    return {"name": name, **{option: value for option, value in options.items() if value is not None}}


def check_given(name, **options):
    """Errors: `StudioError` for what `given` returned where no model could sample with it."""
    if name is not None:
        decoding_of(name, **options)
        return
    from studio import DECODINGS, decodings_for

    plain = {decodings_for(choice.pipeline, ())[0] for choice in DECODINGS.values()}
    for option in options:
        if plain.isdisjoint(owners := _owners(option)):
            raise _unnamed(option, owners)


def named(name, pipe, **options):
    """What `given` returned, with the name of a pipeline's usual decoding where it has none.

    Errors: `StudioError` for an option that another decoding of this pipeline has, and the usual one has not.
    """
    if name is not None:
        return {"name": name, **options}
    from studio import DECODINGS, default_decoding

    kind = type(pipe).__name__
    usual = default_decoding(kind)
    for option in options:
        fitting = [owner for owner in _owners(option) if DECODINGS[owner].pipeline == kind]
        if fitting and usual not in fitting:
            raise _unnamed(option, fitting)
    return {"name": usual, **options}


def decoding_of(name, **options):
    """The settings object for what `named` returned."""
    from studio import decoding_named

    if name == "auto":
        raise StudioError("Name the decoding: auto is for `studio generate`.")
    choice = decoding_named(name)
    for option in options:
        if name not in (owners := _owners(option)):
            told = f"{flag(option)} belongs to --decoding {' or '.join(owners)}, not {name}"
            raise StudioError(f"{told}: leave {flag(option)} out.")
    return choice.settings(**options)


def _owners(option):
    from studio import decodings_with

    return decodings_with(option)


def _unnamed(option, owners):
    told = f"{flag(option)} belongs to --decoding {' or '.join(owners)}"
    return StudioError(f"{told}: say which decoding you mean, or leave {flag(option)} out.")


def shown_name(name, how):
    """A decoding's name in a result; it says so where images do not follow the model's distribution."""
    return f"{name} {how.mode} (approximate)" if getattr(how, "approximate", False) else name


def flag(option):
    """How the command line writes an option."""
    return f"--{option.replace('_', '-')}"


def check_auto(name, tolerance, options):
    """Errors: `StudioError` for options of other decodings beside `auto`, and for its own without it."""
    if name is None and tolerance is not None:
        raise _unnamed("tolerance", ["auto"])
    if name != "auto" and tolerance is not None:
        raise StudioError(f"--tolerance belongs to --decoding auto, not {name}: leave --tolerance out.")
    if name == "auto" and options:
        raise StudioError(f"--decoding auto chooses its own settings: leave {' and '.join(map(flag, options))} out.")


def picked(model, pipe, images, tolerance):
    """What `auto` stands for here, in the form of `given`: the fastest measured decoding within the tolerance."""
    from studio.checkpoints.measured import fastest, read_measured

    rows = read_measured(model, pipe.device)
    if rows is None:
        usual = named(None, pipe)
        command = f"studio bench decoding --model {model} --save"
        warn(f"Nothing was measured here yet: run `{command}`. Sampling with {usual['name']}.")
        return usual
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    row = fastest(rows, images, dtype, 0.03 if tolerance is None else tolerance)
    settings = "".join(f", {name} {value}" for name, value in row["settings"].items())
    say(f"auto: {row['decoding']}{settings}, {row['speedup']:.1f} times as fast as plain decoding when it was measured")
    return {"name": row["decoding"], **row["settings"]}
