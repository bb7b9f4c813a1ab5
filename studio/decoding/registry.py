"""The registry of decodings: what the command line, prompt files, the app, benchmarks and `studio.DECODINGS` offer.

A new decoding is its own file and one entry here. Its options are named here only: command-line flags, fields of a
prompt file, the app's controls and the rows of `studio bench decoding` are made from them. This module imports no heavy
library; the class of the settings is imported when settings are made.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from studio.checks import check_choice, check_integer
from studio.errors import StudioError


@dataclass(frozen=True)
class Option:
    """A number, or a word, that a user may give.

    Args:
        name: the field of the settings class, and the option's name everywhere.
        kind: `int`, `float` or `str`.
        default: what is taken where none is given; None: the model's or the settings' own.
        summary: one line.
        least: the smallest number.
        choices: what a `str` may be, with what a person reads.
        usual: the number that the settings take where none is given; shown only, for options without a `default`.
        convert: from a given value to that of the field; None: it is the value.
    """

    name: str
    kind: type
    default: float | str | None
    summary: str
    least: int | None = None
    choices: dict[str, str] = field(default_factory=dict)
    usual: float | None = None
    convert: Callable[[Any], Any] | None = None

    @property
    def shown_default(self) -> str:
        """What is taken where none is given, for a person."""
        default = self.usual if self.default is None else self.default
        return f"{default:g}" if isinstance(default, (int, float)) else default or "its own"


Settings = Mapping[str, float | str]


@dataclass(frozen=True)
class DecodingChoice:
    """A decoding under its name.

    Args:
        title: what a person reads.
        summary: one line.
        settings_class: its settings, as "module:Class"; what `decoding=` of a pipeline takes.
        options: what may be given.
        pipeline: the class of the pipelines that it is for, by its name.
        needs: the component of a pipeline that it needs, if any.
        benchmarked: from the number of tokens of an image to the options of the rows of `studio bench decoding`.
    """

    title: str
    summary: str
    settings_class: str
    options: tuple[Option, ...] = ()
    pipeline: str = "LlamaGenPipeline"
    needs: str | None = None
    benchmarked: Callable[[int], Sequence[Settings]] = lambda total: [{}]

    def settings(self, **given: float | str | None) -> Any:
        """The settings object, with its defaults for what is not given.

        Raises:
            StudioError: for unknown options, and values that an option cannot have.
        """
        known = {option.name: option for option in self.options}
        if unknown := sorted(set(given) - set(known)):
            allowed = f"takes {', '.join(known)}" if known else "has no options"
            owners = {name: " or ".join(decodings_with(name)) for name in unknown}
            elsewhere = [f"{name} belongs to {names}" for name, names in owners.items() if names]
            sentence = "; ".join([f"{self.title} decoding {allowed}, not {', '.join(unknown)}", *elsewhere])
            raise StudioError(f"{sentence}.")
        values = {name: given.get(name, option.default) for name, option in known.items()}
        values = {
            name: convert(value) if (convert := known[name].convert) else value
            for name, value in values.items()
            if value is not None
        }
        module, name = self.settings_class.split(":")
        return getattr(importlib.import_module(module), name)(**values)

    def label(self, settings: Any) -> str:
        """The title of what `settings` returned, which says so where images do not follow the model's distribution."""
        return f"{self.title}, approximate" if is_approximate(settings) else self.title


def is_approximate(settings: Any) -> bool:
    """Whether images do not follow the model's distribution with these settings, and no bound says how far off."""
    return getattr(settings, "approximate", False)


def _teacher_steps(first: int) -> tuple[int, int] | None:
    first = check_integer("teacher_steps", first)
    return (1, first + 1) if first else None


_DRAFTS = {"jacobi": "guesses of Jacobi decoding", "own": "the model's own drafter, or recycled"}


def _drafts(sampled: bool) -> Option:
    """Where drafts come from."""

    def convert(name: str) -> Any:
        check_choice("drafts", name, _DRAFTS)
        from studio.decoding.eagle import AutoDrafts
        from studio.decoding.jacobi import Jacobi

        return Jacobi() if name == "jacobi" else AutoDrafts(sampled)

    return Option("drafts", str, "jacobi", "Where drafts come from.", choices=_DRAFTS, convert=convert)


_COUPLINGS = {
    "seed": "the tokens of plain decoding",
    "none": "sampled anew",
    "maximal": "kept as often as can be",
    "gumbel": "with noise of their own",
}
_GUIDANCE = Option(
    "guidance_schedule",
    str,
    None,
    "Whether guidance is constant or rises over the image.",
    choices={"constant": "constant", "linear": "rises linearly"},
)
_STEPS = (
    Option("steps", int, None, "Calls of the model, at most one a token.", least=1),
    Option("diffusion_steps", int, None, "Steps that denoise a token, 1 to 1000.", least=1),
)
_ORDERS = {"random": "random", "gtr": "coarse grid first (GtR)"}
_ORDER = Option("order", str, "random", "In which order tokens are sampled.", choices=_ORDERS)
_ANNEALINGS = {"none": "the same for all", "linear": "linear", "cosine": "cosine", "two-stage": "two-stage"}
_CACHES = {"none": "none", "lazy": "only what changes (LazyMAR)"}
_MAR_OPTIONS = (
    *_STEPS,
    _ORDER,
    Option("annealing", str, "none", "How denoising steps fall from token to token (DiSA).", choices=_ANNEALINGS),
    Option("last_diffusion_steps", int, None, "Denoising steps of the last tokens, with annealing.", least=1, usual=5),
    Option("cache", str, "none", "What calls of the model reuse of earlier ones.", choices=_CACHES),
    Option("refresh_every", int, None, "Calls from one full call to the next, with a cache.", least=1, usual=9),
    Option("warm_steps", int, None, "First calls that are all full, with a cache.", least=0, usual=5),
)
_SCHEDULES = {name: name for name in ("cosine", "circle", "arccos")}
_CODE_STEPS = (
    Option("steps", int, None, "Calls of the model, at most one a code.", least=1),
    Option("schedule", str, "cosine", "How the number of hidden codes falls.", choices=_SCHEDULES),
)
_MODES = {"exact": "exact", "relaxed": "relaxed (approximate)"}
_CONFIDENCES = {"cell": "cell", "level": "level"}


_FEW_DIFFUSION_STEPS = 12


def _mar_rows(total: int) -> list[Settings]:
    """Plain; plain with few steps of both kinds; each option added to these alone, and all together."""
    few: Settings = {"steps": max(4, total // 8), "diffusion_steps": _FEW_DIFFUSION_STEPS}
    disa: Settings = {"annealing": "linear", "last_diffusion_steps": 5}
    lazy: Settings = {"cache": "lazy", "refresh_every": 6, "warm_steps": 0}
    gtr: Settings = {"order": "gtr"}
    added: list[Settings] = [{}, disa, lazy, gtr, {**disa, **lazy, **gtr}]
    return [{}, {"steps": total}, *({**few, **options} for options in added)]


def _cspd_rows(total: int) -> list[Settings]:
    few: Settings = {"diffusion_steps": _FEW_DIFFUSION_STEPS, "draft_steps": 8}
    return [{"mode": "exact"}, {"mode": "relaxed"}, {"mode": "relaxed", **few}]


DECODINGS = {
    "ar": DecodingChoice(
        "Plain",
        "One token for each call of the model.",
        "studio.decoding.autoregressive:Autoregressive",
        (_GUIDANCE,),
    ),
    "exact": DecodingChoice(
        "Fastest exact",
        "Plain or Jacobi decoding, whichever is faster here: both generate the same image.",
        "studio.decoding.fastest_exact:FastestExact",
        (_GUIDANCE,),
        benchmarked=lambda total: [],
    ),
    "jacobi": DecodingChoice(
        "Jacobi",
        "The model checks its own guesses, several in one call; the image is that of plain decoding.",
        "studio.decoding.jacobi:Jacobi",
        (
            Option("window", int, None, "Tokens of an image that a call reads, 1 or more.", least=1),
            Option(
                "coupling",
                str,
                "seed",
                "How guesses are made and tested; all keep the distribution.",
                choices=_COUPLINGS,
            ),
            _GUIDANCE,
        ),
        benchmarked=lambda total: [{}, {"coupling": "maximal"}],
    ),  # fmt: skip
    "speculative": DecodingChoice(
        "Speculative",
        "Several drafted tokens are tested in one call; images follow the same distribution.",
        "studio.decoding.speculative:Speculative",
        (_drafts(sampled=False), _GUIDANCE),
        benchmarked=lambda total: [{"drafts": "own"}],
    ),
    "lantern": DecodingChoice(
        "Lantern",
        "As speculative, but a draft may stand in for codes that look like it.",
        "studio.decoding.lantern:Lantern",
        (
            Option("delta", float, 0.1, "How far a token's distribution may move, 0 to 1; 0 is lossless."),
            Option("k", int, 1000, "How many similar codes count.", least=1),
            _drafts(sampled=False),
            _GUIDANCE,
        ),
        benchmarked=lambda total: [
            {"delta": 0.1, "k": 1000, "drafts": "jacobi"},
            {"delta": 1.0, "k": 200, "drafts": "jacobi"},
            {"delta": 0.1, "k": 1000, "drafts": "own"},
            {"delta": 0.4, "k": 1000, "drafts": "own"},
        ],
    ),
    "lantern++": DecodingChoice(
        "Lantern++",
        "As Lantern, with drafts sampled at random, and no token much likelier than the model has it.",
        "studio.decoding.lantern:LanternPlusPlus",
        (
            Option("ratio", float, 5.0, "How many times likelier a token may become, 1 or more; 1 is lossless."),
            Option("k", int, 10, "How many similar codes count.", least=1),
            _drafts(sampled=True),
            _GUIDANCE,
        ),
        benchmarked=lambda total: [
            {"ratio": 5.0, "k": 10, "drafts": "jacobi"},
            {"ratio": 5.0, "k": 10, "drafts": "own"},
        ],
    ),
    "distilled": DecodingChoice(
        "Distilled",
        "A student samples all tokens in a call or a few, without guidance; for pipelines that have one.",
        "studio.decoding.distilled:Distilled",
        (
            Option("steps", int, 1, "Calls of the student.", least=1),
            Option(
                "teacher_steps",
                int,
                0,
                "How many tokens the model itself samples first, with its guidance.",
                least=0,
                convert=_teacher_steps,
            ),
            _GUIDANCE,
        ),
        needs="student",
        benchmarked=lambda total: [
            *({"steps": steps, "teacher_steps": 0} for steps in (1, 2, 4)),
            {"steps": 1, "teacher_steps": total // 4},
        ],
    ),  # fmt: skip
    "mar": DecodingChoice(
        "Masked autoregressive",
        "Several continuous tokens for each call of the model, in a random order.",
        "studio.decoding.mar:MaskedAutoregressive",
        (*_MAR_OPTIONS, _GUIDANCE),
        pipeline="MARPipeline",
        benchmarked=_mar_rows,
    ),
    "cspd": DecodingChoice(
        "Continuous speculative",
        "A small model drafts continuous tokens and the model tests them; exact, or relaxed, which is approximate.",
        "studio.decoding.cspd:ContinuousSpeculative",
        (
            Option(
                "mode",
                str,
                "exact",
                "Exact keeps the model's distribution; relaxed is approximate: images do not follow it.",
                choices=_MODES,
            ),
            *_STEPS,
            _ORDER,
            Option("prefill", float, 0.05, "Share of the steps that the model samples itself first, 0 to 1."),
            Option(
                "draft_steps",
                int,
                None,
                "Steps that are drafted before a test, in relaxed mode.",
                least=1,
                usual=4,
            ),
            Option("inner_temperature", float, None, "How forgiving the test is, in relaxed mode.", usual=42),
            _GUIDANCE,
        ),
        pipeline="MARPipeline",
        needs="drafter",
        benchmarked=_cspd_rows,
    ),  # fmt: skip
    "bridge": DecodingChoice(
        "Dimension-wise",
        "Several cells for each call of the model, in a random order; the numbers of a cell one after the other.",
        "studio.decoding.token_bridge:DimensionWise",
        (Option("steps", int, None, "Calls of the model, at most one a cell.", least=1), _GUIDANCE),
        pipeline="TokenBridgePipeline",
        benchmarked=lambda total: [{}, *({"steps": steps} for steps in (4, 8, 32))],
    ),
    "resgen": DecodingChoice(
        "Most confident first",
        "All levels of residual codes in a few calls of the model; the codes that it is surest of stay.",
        "studio.decoding.resgen:ResGenDecoding",
        (
            *_CODE_STEPS,
            Option(
                "confidence",
                str,
                "cell",
                "Confidence of a whole cell, or of each level.",
                choices=_CONFIDENCES,
            ),
            Option("confidence_temperature", float, 1.0, "Noise on the order at the start, 0 or more."),
            _GUIDANCE,
        ),
        pipeline="ResGenPipeline",
        benchmarked=lambda total: [{}, *({"steps": steps} for steps in (4, 8, 32))],
    ),  # fmt: skip
    "first-hitting": DecodingChoice(
        "First hitting",
        "Codes in a random order, several for each call; exact where there is a call for each code.",
        "studio.decoding.resgen:FirstHitting",
        (*_CODE_STEPS, _GUIDANCE),
        pipeline="ResGenPipeline",
        benchmarked=lambda total: [{"steps": steps} for steps in (4, 8, 32)],
    ),
    "xar": DecodingChoice(
        "Cell by cell, flow",
        "A cell of continuous tokens after the other, each by a flow from noise.",
        "studio.decoding.xar:XARDecoding",
        (Option("steps", int, None, "Steps of the flow of a cell, each a call of the model.", least=1), _GUIDANCE),
        pipeline="XARPipeline",
        benchmarked=lambda total: [{}, *({"steps": steps} for steps in (5, 10, 40))],
    ),
    "rq": DecodingChoice(
        "Cell by cell",
        "A stack of residual codes for each call of the model, its codes one after the other, coarse to fine.",
        "studio.decoding.rq_transformer:RQDecoding",
        (_GUIDANCE,),
        pipeline="RQTransformerPipeline",
    ),
}


def decoding_named(name: str) -> DecodingChoice:
    """The decoding of this name.

    Raises:
        StudioError: for an unknown name.
    """
    check_choice("The decoding", name, DECODINGS)
    return DECODINGS[name]


def decoding_options() -> dict[str, dict[str, Option]]:
    """All options by their name, each by the names of the decodings that have it."""
    found: dict[str, dict[str, Option]] = {}
    for decoding, choice in DECODINGS.items():
        for option in choice.options:
            found.setdefault(option.name, {})[decoding] = option
    return found


def decodings_with(option: str) -> list[str]:
    """Names of the decodings that have an option of this name."""
    return list(decoding_options().get(option, {}))


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
