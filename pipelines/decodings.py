"""The ways to sample tokens, by the names that the command line and the app offer; a new one is one more entry."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from studio.checks import check_choice, check_integer
from studio.decoding.autoregressive import Autoregressive
from studio.decoding.cspd import ContinuousSpeculative
from studio.decoding.distilled import Distilled
from studio.decoding.eagle import AutoDrafts
from studio.decoding.fastest_exact import FastestExact
from studio.decoding.jacobi import Jacobi
from studio.decoding.lantern import Lantern, LanternPlusPlus
from studio.decoding.mar import MaskedAutoregressive
from studio.decoding.resgen import FirstHitting, ResGenDecoding
from studio.decoding.rq_transformer import RQDecoding
from studio.decoding.speculative import Speculative
from studio.decoding.token_bridge import DimensionWise
from studio.errors import StudioError


@dataclass(frozen=True)
class Option:
    """A number, or a word, that a user may give.

    Args:
        name: keyword of `DecodingChoice.settings`.
        kind: `int`, `float` or `str`.
        default: what is taken where none is given; None: the model's or the decoding's own.
        summary: one line.
        choices: what a `str` may be, with what a person reads.
    """

    name: str
    kind: type
    default: float | str | None
    summary: str
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodingChoice:
    """A decoding under its name.

    Args:
        title: what a person reads.
        summary: one line.
        make: from the options, as keywords, to what `decoding=` of a pipeline takes.
        options: what may be given.
        pipeline: the class of the pipelines that it is for, by its name.
        needs: the component of a pipeline that it needs, if any.
    """

    title: str
    summary: str
    make: Callable
    options: tuple[Option, ...] = ()
    pipeline: str = "LlamaGenPipeline"
    needs: str | None = None

    def settings(self, **given):
        """The settings object, with its defaults for what is not given. Errors: `StudioError` for unknown options."""
        known = {option.name: option.default for option in self.options}
        if unknown := sorted(set(given) - set(known)):
            allowed = f"takes {', '.join(known)}" if known else "has no options"
            owners = {name: " or ".join(decodings_with(name)) for name in unknown}
            elsewhere = [f"{name} belongs to {names}" for name, names in owners.items() if names]
            told = "; ".join([f"{self.title} decoding {allowed}, not {', '.join(unknown)}", *elsewhere])
            raise StudioError(f"{told}.")
        return self.make(**{**known, **given})

    def label(self, settings) -> str:
        """The title of what `settings` returned, which says so where images do not follow the model's distribution."""
        return f"{self.title}, approximate" if is_approximate(settings) else self.title


def is_approximate(settings) -> bool:
    """Whether images sampled with these settings do not follow the model's distribution, and no bound says how far
    off."""
    return getattr(settings, "approximate", False)


def _distilled(steps: int, teacher_steps: int) -> Distilled:
    first = check_integer("teacher_steps", teacher_steps)
    return Distilled(steps, (1, first + 1) if first else None)


def _drafts(name: str, sampled: bool = False):
    """Where the drafts of LANTERN come from."""
    if name not in _DRAFTS:
        raise StudioError(f"drafts are one of {', '.join(_DRAFTS)}, not {name!r}.")
    return Jacobi() if name == "jacobi" else AutoDrafts(sampled)


_DRAFTS = {"own": "the model's own drafter, or recycled", "jacobi": "guesses of Jacobi decoding"}
_DRAFTS_OPTION = Option("drafts", str, "own", "Where drafts come from.", _DRAFTS)
_COUPLINGS = {
    "seed": "the tokens of plain decoding",
    "none": "sampled anew",
    "maximal": "kept as often as can be",
    "gumbel": "with noise of their own",
}
_STEPS = (
    Option("steps", int, None, "Calls of the model, at most one a token."),
    Option("diffusion_steps", int, None, "Steps that denoise a token, 1 to 1000."),
)
_CODE_STEPS = (
    Option("steps", int, None, "Calls of the model, at most one a code."),
    Option(
        "schedule",
        str,
        "cosine",
        "How the number of hidden codes falls.",
        {"cosine": "cosine", "circle": "circle", "arccos": "arccos"},
    ),
)

DECODINGS = {
    "ar": DecodingChoice("Plain", "One token for each call of the model.", Autoregressive),
    "exact": DecodingChoice(
        "Fastest exact",
        "Plain or Jacobi decoding, whichever is faster here: both generate the same image.",
        FastestExact,
    ),
    "jacobi": DecodingChoice(
        "Jacobi",
        "The model checks its own guesses, several in one call; the image is that of plain decoding.",
        lambda window, coupling: Jacobi("auto" if window is None else window, coupling),
        (
            Option("window", int, None, "Tokens of an image that a call reads, 1 or more."),
            Option("coupling", str, "seed", "How guesses are made and tested; all keep the distribution.", _COUPLINGS),
        ),
    ),
    "speculative": DecodingChoice(
        "Speculative",
        "Several drafted tokens are tested in one call; images follow the same distribution.",
        Speculative,
    ),
    "lantern": DecodingChoice(
        "Lantern",
        "As speculative, but a draft may stand in for codes that look like it.",
        lambda neighbours, delta, drafts: Lantern(k=neighbours, delta=delta, drafts=_drafts(drafts)),
        (
            Option("delta", float, 0.1, "How far a token's distribution may move, 0 to 1; 0 is lossless."),
            Option("neighbours", int, 1000, "How many similar codes count."),
            _DRAFTS_OPTION,
        ),
    ),
    "lantern++": DecodingChoice(
        "Lantern++",
        "As Lantern, with drafts sampled at random, and no token much likelier than the model has it.",
        lambda neighbours, ratio, drafts: LanternPlusPlus(
            k=neighbours, ratio_budget=ratio, drafts=_drafts(drafts, sampled=True)
        ),
        (
            Option("ratio", float, 5.0, "How many times likelier a token may become, 1 or more; 1 is lossless."),
            Option("neighbours", int, 10, "How many similar codes count."),
            _DRAFTS_OPTION,
        ),
    ),
    "distilled": DecodingChoice(
        "Distilled",
        "A student samples all tokens in a call or a few, without guidance; for pipelines that have one.",
        _distilled,
        (
            Option("steps", int, 1, "Calls of the student."),
            Option("teacher_steps", int, 0, "How many tokens the model itself samples first, with its guidance."),
        ),
        needs="student",
    ),
    "mar": DecodingChoice(
        "Masked autoregressive",
        "Several continuous tokens for each call of the model, in a random order.",
        MaskedAutoregressive,
        _STEPS,
        pipeline="MARPipeline",
    ),
    "cspd": DecodingChoice(
        "Continuous speculative",
        "A small model drafts continuous tokens and the model tests them; exact, or relaxed, which is approximate.",
        ContinuousSpeculative,
        (
            Option(
                "mode",
                str,
                "exact",
                "Exact keeps the model's distribution; relaxed is approximate: images do not follow it.",
                {"exact": "exact", "relaxed": "relaxed (approximate)"},
            ),
            *_STEPS,
            Option("prefill", float, 0.05, "BatchSpec of the steps that the model samples itself first, 0 to 1."),
            Option("draft_steps", int, None, "Relaxed: steps that are drafted before a test; 4 where none are given."),
            Option("inner_temperature", float, None, "Relaxed: how forgiving the test is; 42 where none is given."),
        ),
        pipeline="MARPipeline",
        needs="drafter",
    ),
    "bridge": DecodingChoice(
        "Dimension-wise",
        "Several cells for each call of the model, in a random order; the numbers of a cell one after the other.",
        DimensionWise,
        (Option("steps", int, None, "Calls of the model, at most one a cell."),),
        pipeline="TokenBridgePipeline",
    ),
    "resgen": DecodingChoice(
        "Most confident first",
        "All levels of residual codes in a few calls of the model; the codes that it is surest of stay.",
        ResGenDecoding,
        (
            *_CODE_STEPS,
            Option(
                "confidence",
                str,
                "cell",
                "What counts: all levels of a cell together, or what each adds.",
                {"cell": "cell", "level": "level"},
            ),
            Option("confidence_temperature", float, 1.0, "Noise on the order at the start, 0 or more."),
        ),
        pipeline="ResGenPipeline",
    ),
    "first-hitting": DecodingChoice(
        "First hitting",
        "As many codes for each call, in a random order; exact where there is a call for each code.",
        FirstHitting,
        _CODE_STEPS,
        pipeline="ResGenPipeline",
    ),
    "rq": DecodingChoice(
        "Cell by cell",
        "A stack of residual codes for each call of the model, its codes one after the other, coarse to fine.",
        RQDecoding,
        pipeline="RQTransformerPipeline",
    ),
}


def decoding_named(name: str) -> DecodingChoice:
    """Errors: `StudioError` for an unknown name."""
    check_choice("The decoding", name, DECODINGS)
    return DECODINGS[name]


def decodings_with(option: str) -> list[str]:
    """Names of the decodings that have an option of this name."""
    return [name for name, choice in DECODINGS.items() if option in {each.name for each in choice.options}]


def decodings_for(pipeline: str, components: Collection[str]) -> list[str]:
    """Names of the decodings that fit a pipeline, the plain one first.

    Args:
        pipeline: the name of its class.
        components: the names of the components that it has.
    """
    return [
        name
        for name, choice in DECODINGS.items()
        if choice.pipeline == pipeline and (choice.needs is None or choice.needs in components)
    ]


def default_decoding(pipeline: str) -> str:
    """The name of the decoding that the command line and the app take for a pipeline, where none is chosen."""
    plain = decodings_for(pipeline, ())[0]
    return "exact" if DECODINGS["exact"].pipeline == pipeline else plain
