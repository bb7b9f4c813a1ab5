"""The work behind the Compare tab: one prompt sampled by several models and decodings, one after the other."""

import dataclasses
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from studio import DECODINGS
from studio.checks import as_integer, check_integer, check_text, set_fields, shown
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Call, as_files
from studio.ui.jobs.request import GenerateRequest, sample_seed
from studio.ui.render.preview import Sketch
from studio.ui.server.models import fitting_decodings, get_judge, get_pipeline
from studio.ui.server.worker import Job, follow
from studio.ui.server.zerogpu import on_gpu
from studio.ui.tabs.components import short_name

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDES = 6
MAX_IMAGES_PER_SIDE = 4
_LONGEST_SIDE = 1000  # characters
NOTHING_NAMED = "The prompt names nothing that the judge knows: it scores concepts such as a red apple."


@dataclasses.dataclass(frozen=True)
class CompareRequest:
    """A prompt and the models and decodings that sample it.

    Args:
        prompt: the text.
        sides: 2 to 6 of `MODEL` or `MODEL: DECODING`, with options as in `MODEL: lantern delta=0.3`; options without a
            decoding are those of the model's default.
        count: images of each side, 1 to 4.
        seed: of the first image of every side; sampled when `None`.

    Raises:
        StudioError: a value of another type or outside its range.
    """

    prompt: str
    sides: tuple[str, ...]
    count: int = 1
    seed: int | None = None
    requests: tuple[GenerateRequest, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        listed = self.sides if isinstance(self.sides, list | tuple) else [self.sides or ""]
        sides = [check_text("A model and its decoding", side, _LONGEST_SIDE).strip() for side in listed]
        sides = [side for side in sides if side]
        if not 2 <= len(sides) <= MAX_SIDES:
            raise StudioError(f"Choose from 2 to {MAX_SIDES} models and decodings to compare, not {len(sides)}.")
        if len(set(sides)) < len(sides):
            raise StudioError("One of the models and decodings is chosen twice: leave one of them out.")
        count = check_integer("The number of images of each", as_integer(self.count), 1, MAX_IMAGES_PER_SIDE)
        set_fields(self, sides=tuple(sides), count=count, seed=sample_seed() if self.seed is None else self.seed)
        set_fields(self, requests=tuple(self._request(side) for side in sides))

    def _request(self, side: str) -> GenerateRequest:
        model, _, how = side.rpartition(": ")
        if not model:
            model, how = side, ""
        name, *options = how.split() or [""]
        if not name or "=" in name:
            name, options = fitting_decodings(model)[0], how.split()
        if malformed := [option for option in options if not all(option.partition("="))]:
            raise StudioError(f"Write an option as NAME=NUMBER, such as delta=0.3, not {shown(malformed[0])}.")
        texts = dict(option.split("=", 1) for option in options)
        if len(texts) < len(options):
            raise StudioError(f"An option is given twice in {shown(how)}: leave one of them out.")
        request = GenerateRequest.from_fields(model, self.prompt, self.count, decoding=name, options=texts)
        return dataclasses.replace(request, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Side:
    """The state of one model and decoding.

    Args:
        title: of the model and the decoding.
        request: of this side.
        sampled, total: tokens of an image.
        images: empty until they are finished.
        trace: of the drafts of the first image, once finished, where drafts are made.
        stats: those of the pipeline, once finished.
        judge_predictions: of each image, once finished, where the judge knows the model.
        unscored: the reason why there is no judge score, or `None`.
    """

    title: str
    request: GenerateRequest
    sampled: int = 0
    total: int = 0
    images: "tuple[Image, ...]" = ()
    trace: DraftTrace | None = None
    stats: Any = None
    judge_predictions: tuple[Any, ...] = ()
    unscored: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The state of a `CompareRequest`.

    Args:
        sides: in the order in which they sample.
        running: the index of the side that samples; `None` before the first and after the last.
        loading: the title of the side that is being loaded and warmed up, or `None`.
        seconds: since the running side began.
        warning: a note for the user, or `None`.
    """

    sides: tuple[Side, ...]
    running: int | None = None
    loading: str | None = None
    seconds: float = 0.0
    warning: str | None = None

    @property
    def finished(self) -> bool:
        """Whether all sides are done."""
        return all(side.stats for side in self.sides)


def compare(request: CompareRequest) -> AsyncIterator[Comparison]:
    """Follow a request.

    All sides first sample a step that does not count. So clocks leave out the cost of a first call, and a request that
    a model refuses fails before anything is sampled.

    Yields:
        The state so far; the last one is finished.

    Raises:
        StudioError: a model cannot be loaded, or refuses its request.
    """
    return follow(lambda job: _compare(request, job))


def title_of(model: str, decoding: str) -> str:
    """The title of a model and a decoding."""
    return f"{short_name(model)}: {decoding}"


def offered_sides(models: Iterable[str]) -> list[tuple[str, str]]:
    """The choices of the tab: pairs (title, side) of models and their decodings.

    Whichever is faster of plain and Jacobi decoding is no side of its own: both are.
    """
    return [
        (title_of(model, DECODINGS[name].title), f"{model}: {name}")
        for model in models
        for name in fitting_decodings(model)
        if name != "exact"
    ]


@on_gpu(seconds=120)
def _compare(request: CompareRequest, job: Job) -> Comparison:
    sides = tuple(Side(title_of(each.model, each.title), each) for each in request.requests)
    found = Comparison(sides)
    calls: list[Call] = []
    for side in sides:
        if job.stopped:
            return found
        job.report(dataclasses.replace(found, loading=side.title))
        calls.append(_warmed_up(side.request, job))
    found = dataclasses.replace(found, warning=" ".join(dict.fromkeys(filter(None, (call.warning for call in calls)))))
    for number, call in enumerate(calls):
        if not job.stopped:
            found = _sampled(found, number, call, job)
            if not found.finished:
                job.report(found)
    return found


def _warmed_up(request: GenerateRequest, job: Job) -> Call:
    """The call of a side, after a first step that does not count."""
    call = Call(get_pipeline(request.model, job.device), request)
    call(lambda sketch: True)
    return Call(call.pipe, request)


def _sampled(found: Comparison, number: int, call: Call, job: Job) -> Comparison:
    """The comparison after one more side."""
    found, began = _with_side(found, number, total=call.total), time.monotonic()

    def on_step(sketch: Sketch) -> bool:
        if not job.stopped:
            now = _with_side(found, number, sampled=sketch.sampled)
            job.report(dataclasses.replace(now, running=number, seconds=time.monotonic() - began))
        return job.stopped

    output = call(on_step)
    if job.stopped:
        return found
    judge_predictions, unscored = _judged(output.images, call.request)
    return _with_side(
        found,
        number,
        sampled=call.total,
        images=tuple(as_files(output.images, call.request)),
        trace=call.trace(Sketch(output.tokens)),
        stats=output.stats,
        judge_predictions=judge_predictions,
        unscored=unscored,
    )


def _with_side(found: Comparison, number: int, **changes: Any) -> Comparison:
    sides = [*found.sides]
    sides[number] = dataclasses.replace(sides[number], **changes)
    return dataclasses.replace(found, sides=tuple(sides))


def _judged(images: "Sequence[Image]", request: GenerateRequest) -> tuple[tuple[Any, ...], str | None]:
    """The predictions of the judge, and the reason why they give no score, as of `Side`."""
    from studio.evaluation.judge_predictions import judge_predictions

    try:
        found = tuple(judge_predictions(get_judge(request.model), images, request.prompt))
    except StudioError as error:
        return (), str(error)
    return found, NOTHING_NAMED if found[0].agreement is None else None
