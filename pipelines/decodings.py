"""The ways to draw tokens, by the names that the command line and the app offer; a new one is one more entry."""

from collections.abc import Callable
from dataclasses import dataclass

from studio.decoding.autoregressive import Autoregressive
from studio.decoding.distilled import Distilled
from studio.decoding.lantern import Lantern, LanternPlusPlus
from studio.decoding.speculative import Speculative
from studio.errors import StudioError


@dataclass(frozen=True)
class Option:
    """A number that a user may give.

    Args:
        name: keyword of `DecodingChoice.settings`.
        kind: `int` or `float`.
        default: what is taken where none is given.
        summary: one line.
    """

    name: str
    kind: type
    default: float | None
    summary: str


@dataclass(frozen=True)
class DecodingChoice:
    """A decoding under its name.

    Args:
        title: what a person reads.
        summary: one line.
        make: from the options, as keywords, to what `decoding=` of a pipeline takes.
        options: what may be given.
    """

    title: str
    summary: str
    make: Callable
    options: tuple[Option, ...] = ()

    def settings(self, **given):
        """The settings object, with its defaults for what is not given. Errors: `StudioError` for unknown options."""
        known = {option.name: option.default for option in self.options}
        if unknown := sorted(set(given) - set(known)):
            allowed = f"takes {', '.join(known)}" if known else "has no options"
            raise StudioError(f"{self.title} decoding {allowed}, not {', '.join(unknown)}.")
        return self.make(**{**known, **given})


DECODINGS = {
    "ar": DecodingChoice("Plain", "One token for each call of the model.", Autoregressive),
    "speculative": DecodingChoice(
        "Speculative", "Several drafted tokens are tested in one call; pictures follow the same law.", Speculative
    ),
    "lantern": DecodingChoice(
        "Lantern",
        "As speculative, but a draft may stand in for codes that look like it.",
        lambda neighbours, delta: Lantern(k=neighbours, delta=delta),
        (
            Option("delta", float, 0.1, "How far a token's law may move, 0 to 1; 0 is lossless."),
            Option("neighbours", int, 1000, "How many similar codes count."),
        ),
    ),
    "lantern++": DecodingChoice(
        "Lantern++",
        "As Lantern, with drafts drawn at random, and no token much likelier than the model has it.",
        lambda neighbours, ratio: LanternPlusPlus(k=neighbours, ratio_budget=ratio),
        (
            Option("ratio", float, 5.0, "How many times likelier a token may become, 1 or more; 1 is lossless."),
            Option("neighbours", int, 10, "How many similar codes count."),
        ),
    ),
    "distilled": DecodingChoice(
        "Distilled",
        "A student draws all tokens in a call or a few, without guidance; for pipelines that have one.",
        lambda steps, teacher_steps: Distilled(steps, (1, teacher_steps + 1) if teacher_steps else None),
        (
            Option("steps", int, 1, "Calls of the student."),
            Option("teacher_steps", int, 0, "How many tokens the model itself draws first, with its guidance."),
        ),
    ),
}


def decoding_named(name: str) -> DecodingChoice:
    """Errors: `StudioError` for an unknown name."""
    if name not in DECODINGS:
        raise StudioError(f"The decoding is one of {', '.join(DECODINGS)}, not {name!r}.")
    return DECODINGS[name]
