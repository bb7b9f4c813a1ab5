"""The options that say how tokens are sampled, for every command that samples: a flag for each of the registry."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from studio import DECODINGS, decoding_named, decoding_options, decodings_for, decodings_with, default_decoding
from studio.commands.options import finite, number
from studio.console import say, warn
from studio.errors import StudioError


def _decoding_help() -> str:
    """The names of the decodings, by what they sample from."""
    by_pipeline: dict[str, list[str]] = {}
    for name, choice in DECODINGS.items():
        by_pipeline.setdefault(choice.pipeline, []).append(name)
    names = "; ".join(f"{kind.removesuffix('Pipeline')}: {', '.join(names)}" for kind, names in by_pipeline.items())
    return f"How tokens are generated. {names}; auto (the fastest that was measured here)."


def _usual() -> str:
    kinds = dict.fromkeys(choice.pipeline for choice in DECODINGS.values())
    return ", ".join(map(default_decoding, kinds))


Tolerance = Annotated[
    float | None,
    number(
        "--tolerance", help="auto: how much of the judge's top-1 accuracy may be lost, 0 to 1.", show_default="0.03"
    ),
]


def _flag_parameter(name: str, by_decoding: dict[str, Any]) -> inspect.Parameter:
    """The parameter of a command for one option, which several decodings may have."""
    owners: dict[str, list[str]] = {}
    for decoding, option in by_decoding.items():
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        owners.setdefault(option.summary.removesuffix(".") + choices, []).append(decoding)
    shown = dict.fromkeys(option.shown_default for option in by_decoding.values())
    option = next(iter(by_decoding.values()))
    declared = typer.Option(
        flag(name),
        min=option.least,
        callback=finite if option.kind is float else None,
        help=". ".join(_owned(summary, names) for summary, names in owners.items()) + ".",
        show_default="; ".join(shown),
    )
    return _parameter(name, option.kind, declared)


def _owned(summary: str, owners: list[str]) -> str:
    return summary if len(owners) == len(DECODINGS) else f"{', '.join(owners)}: {summary}"


def _parameter(name: str, kind: type, declared: Any) -> inspect.Parameter:
    annotation: Any = Annotated[kind | None, declared]  # type: ignore[valid-type]  # a type at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_decoding(command: Callable) -> Callable:
    """Gives a command the flag `--decoding` and one for each option of a decoding.

    The command has parameters `decoding`, the name or None, and `options`, which is a dict of those that are given.
    """
    signature = inspect.signature(command)
    declared = typer.Option("--decoding", help=_decoding_help(), show_default=_usual())
    flags = {name: _flag_parameter(name, owners) for name, owners in decoding_options().items()}

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        options = {name: value for name in flags if (value := values.pop(name)) is not None}
        return command(**values, options=options)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name == "decoding":
            parameters.append(_parameter(name, str, declared))
        elif name == "options":
            parameters += flags.values()
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    vars(wrapped)["__signature__"] = signature.replace(parameters=parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def given(name: str | None, **options: Any) -> dict[str, Any]:
    """`{"name": ..., and the options that were given}`; None is the usual decoding of whatever model samples."""
    return {"name": name, **{option: value for option, value in options.items() if value is not None}}


def check_given(name: str | None, **options: Any) -> None:
    """Raises a `StudioError` for what `given` returned where no model could sample with it."""
    if name is not None:
        decoding_of(name, **options)
        return
    plain = {decodings_for(choice.pipeline, ())[0] for choice in DECODINGS.values()}
    for option in options:
        if plain.isdisjoint(owners := decodings_with(option)):
            raise _unnamed(option, owners)


def named(name: str | None, pipe: Any, **options: Any) -> dict[str, Any]:
    """What `given` returned, with the name of a pipeline's usual decoding where it has none.

    Raises:
        StudioError: for an option that another decoding of this pipeline has, and the usual one has not.
    """
    if name is not None:
        return {"name": name, **options}
    kind = type(pipe).__name__
    usual = default_decoding(kind)
    for option in options:
        fitting = [owner for owner in decodings_with(option) if DECODINGS[owner].pipeline == kind]
        if fitting and usual not in fitting:
            raise _unnamed(option, fitting)
    return {"name": usual, **options}


def decoding_of(name: str, **options: Any) -> Any:
    """The settings object for what `named` returned."""
    if name == "auto":
        raise StudioError("Name the decoding: auto is for `studio generate`.")
    choice = decoding_named(name)
    for option in options:
        if name not in (owners := decodings_with(option)):
            sentence = f"{flag(option)} belongs to --decoding {' or '.join(owners)}, not {name}"
            raise StudioError(f"{sentence}: leave {flag(option)} out.")
    return choice.settings(**options)


def _unnamed(option: str, owners: list[str]) -> StudioError:
    sentence = f"{flag(option)} belongs to --decoding {' or '.join(owners)}"
    return StudioError(f"{sentence}: say which decoding you mean, or leave {flag(option)} out.")


def shown_name(name: str, how: Any) -> str:
    """A decoding's name in a result; it says so where images do not follow the model's distribution."""
    if not getattr(how, "approximate", False):
        return name
    mode = getattr(how, "mode", "")
    return f"{name} {mode} (approximate)" if mode else f"{name} (approximate)"


def flag(option: str) -> str:
    """How the command line writes an option."""
    return f"--{option.replace('_', '-')}"


def check_auto(name: str | None, tolerance: float | None, options: list[str]) -> None:
    """Raises a `StudioError` for options of other decodings beside `auto`, and for its own without it."""
    if name is None and tolerance is not None:
        raise _unnamed("tolerance", ["auto"])
    if name != "auto" and tolerance is not None:
        raise StudioError(f"--tolerance belongs to --decoding auto, not {name}: leave --tolerance out.")
    if name == "auto" and options:
        raise StudioError(f"--decoding auto chooses its own settings: leave {' and '.join(map(flag, options))} out.")


def check_packed(dtype: str | None, model: str, pipe: Any) -> None:
    """Raises a `StudioError` for packed weights of a model that has none."""
    if dtype == "int8" and DECODINGS["ar"].pipeline != type(pipe).__name__:
        raise StudioError(f"--dtype int8 is for LlamaGen models: leave it out for {model}.")


def picked(model: str, pipe: Any, images: int, tolerance: float | None) -> dict[str, Any]:
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
