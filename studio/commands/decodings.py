"""The options that say how tokens are drawn, for every command that draws."""

from typing import Annotated

import typer

from studio.commands.options import number
from studio.errors import StudioError

Decoding = Annotated[
    str | None,
    typer.Option(
        "--decoding",
        help="How tokens are drawn: ar, speculative (same law), lantern, lantern++ (relaxed) or distilled (a student).",
        show_default="ar",
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
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="distilled: calls of the student.", show_default="1")]
TeacherSteps = Annotated[
    int | None,
    typer.Option(
        "--teacher-steps", min=0, help="distilled: tokens that the model itself draws first.", show_default="0"
    ),
]


def given(name, **options):
    """`{"name": ..., and the options that were given}`, "ar" without a name."""
    return {"name": name or "ar", **{option: value for option, value in options.items() if value is not None}}


def decoding_of(name, **options):
    """The settings object for what `given` returned."""
    from studio import DECODINGS, decoding_named

    choice = decoding_named(name)
    known = {option.name for option in choice.options}
    for option in options.keys() - known:
        owners = [other for other, its in DECODINGS.items() if option in {each.name for each in its.options}]
        flag = f"--{option.replace('_', '-')}"
        raise StudioError(f"{flag} belongs to --decoding {' or '.join(owners)}, not {name}: leave {flag} out.")
    return choice.settings(**options)
