"""One prompt sampled by several models and decodings, one after the other, each with the machine for itself."""

import dataclasses
import time

from studio import DECODINGS
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Call, as_files
from studio.ui.jobs.request import GenerateRequest, sample_seed
from studio.ui.render.preview import Sketch
from studio.ui.server.checks import check_text, is_whole
from studio.ui.server.models import fitting_decodings, get_judge, get_pipeline
from studio.ui.server.worker import follow
from studio.ui.server.zerogpu import on_gpu
from studio.ui.tabs.components import short_name

MAX_SIDES = 6
MAX_IMAGES_PER_SIDE = 4  # images of each side
_LONGEST_SIDE = 1000  # characters
NOTHING_NAMED = "The prompt names nothing that the judge knows: it scores concepts such as a red apple."


@dataclasses.dataclass(frozen=True)
class CompareRequest:
    """What is to be compared.

    Args:
        prompt: what to sample.
        sides: what samples, as `MODEL` or `MODEL: DECODING`, with options as in `MODEL: lantern delta=0.3`; without a
            name they are those of its usual decoding.
        count: images of each side.
        seed: of the first image of every side; sampled when `None`.
    """

    prompt: str
    sides: tuple[str, ...]
    count: int = 1
    seed: int | None = None

    def __post_init__(self):
        listed = self.sides if isinstance(self.sides, list | tuple) else [self.sides or ""]
        sides = [check_text("A model and its decoding", side, _LONGEST_SIDE).strip() for side in listed]
        sides = [side for side in sides if side]
        if not 2 <= len(sides) <= MAX_SIDES:
            raise StudioError(f"Choose from 2 to {MAX_SIDES} models and decodings to compare, not {len(sides)}.")
        if len(set(sides)) < len(sides):
            raise StudioError("One of the models and decodings is chosen twice: leave one of them out.")
        if not is_whole(self.count) or not 1 <= self.count <= MAX_IMAGES_PER_SIDE:
            raise StudioError(f"Choose between 1 and {MAX_IMAGES_PER_SIDE} images of each.")
        object.__setattr__(self, "sides", tuple(sides))
        object.__setattr__(self, "seed", sample_seed() if self.seed is None else self.seed)
        object.__setattr__(self, "requests", tuple(self._request(side) for side in sides))

    def _request(self, side):
        model, _, how = side.rpartition(": ")
        if not model:
            model, how = side, ""
        name, *options = how.split() or [""]
        if not name or "=" in name:
            name, options = fitting_decodings(model)[0], how.split()
        if malformed := [option for option in options if not all(option.partition("="))]:
            raise StudioError(f"Write an option as NAME=NUMBER, such as delta=0.3, not {malformed[0]!r}.")
        texts = dict(option.split("=", 1) for option in options)
        if len(texts) < len(options):
            raise StudioError(f"An option is given twice in {how!r}: leave one of them out.")
        request = GenerateRequest.from_fields(model, self.prompt, self.count, *[""] * 5, name, texts)
        return dataclasses.replace(request, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Side:
    """Where one side stands.

    Args:
        title: its model and decoding.
        request: see `studio.ui.jobs.request`.
        sampled, total: tokens of an image.
        images: when they are finished, else none.
        trace: of the first image's tokens, then, where drafts are made one by one.
        stats: those of the pipeline, then.
        judge_predictions: the judge's on each image, where it knows what the model samples.
        unscored: a sentence that says why these give no score, then, or `None` where they do.
    """

    title: str
    request: GenerateRequest
    sampled: int = 0
    total: int = 0
    images: tuple = ()
    trace: DraftTrace | None = None
    stats: object = None
    judge_predictions: tuple = ()
    unscored: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Where a comparison stands.

    Args:
        sides: in the order in which they sample.
        running: the number of the one that is being sampled; `None` before the first and after the last.
        loading: what is being loaded and tried, or `None`.
        seconds: since this side began.
        warning: what the user should know, or `None`.
    """

    sides: tuple[Side, ...]
    running: int | None = None
    loading: str | None = None
    seconds: float = 0.0
    warning: str | None = None

    @property
    def finished(self):
        return all(side.stats for side in self.sides)


def compare(request):
    """Follow a `CompareRequest`: an asynchronous iterator over `Comparison`, the last one finished.

    Every side first samples a token or two that do not count, so that no clock shows what only the first call costs,
    and what cannot be sampled is known before anything is.

    Raises:
        StudioError: a model cannot be loaded, or refuses what it should sample.
    """
    return follow(lambda job: _compare(request, job))


def title_of(model, decoding):
    """A model and a decoding as a person reads them."""
    return f"{short_name(model)}: {decoding}"


def offered_sides(models):
    """What may be compared without a word of one's own: pairs (title, side) of models and their decodings."""
    return [
        (title_of(model, DECODINGS[name].title), f"{model}: {name}")
        for model in models
        for name in fitting_decodings(model)
    ]


@on_gpu(seconds=120)
def _compare(request, job):
    sides = tuple(Side(title_of(each.model, each.title), each) for each in request.requests)
    found, calls = Comparison(sides), []
    for side in sides:
        if job.stopped:
            return found
        job.report(dataclasses.replace(found, loading=side.title))
        calls.append(_tried(side.request, job))
    found = dataclasses.replace(found, warning=" ".join(dict.fromkeys(filter(None, (call.warning for call in calls)))))
    for number, call in enumerate(calls):
        if not job.stopped:
            found = _sampled(found, number, call, job)
            if not found.finished:
                job.report(found)
    return found


def _tried(request, job):
    """The call of a side, after a first step that does not count."""
    call = Call(get_pipeline(request.model, job.device), request)
    call(lambda sketch: True)
    return Call(call.pipe, request)


def _sampled(found, number, call, job):
    """The comparison after one more side."""
    found, began = _with_side(found, number, total=call.total), time.monotonic()

    def on_step(sketch):
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


def _with_side(found, number, **changes):
    sides = [*found.sides]
    sides[number] = dataclasses.replace(sides[number], **changes)
    return dataclasses.replace(found, sides=tuple(sides))


def _judged(images, request):
    """The judge's judge_predictions, and why they give no score, as of `Side`."""
    from studio.evaluation.judge_predictions import judge_predictions

    try:
        found = tuple(judge_predictions(get_judge(request.model), images, request.prompt))
    except StudioError as error:
        return (), str(error)
    return found, NOTHING_NAMED if found[0].agreement is None else None
