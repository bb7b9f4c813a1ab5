"""What the app asks a model that reads images, and what comes back while it answers."""

import dataclasses
from pathlib import Path

from studio import pruning_methods
from studio.errors import StudioError
from studio.ui.server.checks import check_flag, is_number, is_whole
from studio.ui.server.limits import check_model, check_words, limits
from studio.ui.server.models import get_reader
from studio.ui.server.worker import follow
from studio.ui.server.zerogpu import on_gpu

_MOST_TOKENS = 4096  # of an answer, where no limit is set


@dataclasses.dataclass(frozen=True)
class AskRequest:
    """One question about one image.

    Args:
        model: what `studio.load` takes.
        image: path of the file.
        question: what to ask.
        method, keep: how tokens are chosen, and the share that stays.
        compare: whether to ask the same with all tokens afterwards.
        max_new_tokens: longest answer.
    """

    model: str | None
    image: str | None
    question: str
    method: str = "divprune"
    keep: float = 0.2
    compare: bool = True
    max_new_tokens: int = 64

    def __post_init__(self):
        if self.model in (None, "") or not check_model(self.model).strip():
            raise StudioError(
                "Name a model that reads images: a Hugging Face id, a folder, or what "
                "`studio train --preset emoji-vlm` made."
            )
        if not self.image:
            raise StudioError("Give an image first: drop a file on the field, or take an example.")
        if self.question is None or not check_words("The question", self.question).strip():
            raise StudioError("The question is empty: ask something about the image.")
        methods = pruning_methods()
        if self.method not in list(methods):
            raise StudioError(f"Choose how tokens are chosen: {', '.join(methods)}.")
        check_flag("Whether to compare", self.compare)
        most = _MOST_TOKENS if limits().answer is None else limits().answer
        if not is_whole(self.max_new_tokens) or not 1 <= self.max_new_tokens <= most:
            raise StudioError(f"An answer has at least 1 and at most {most} tokens here.")
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise StudioError("Keep a share of the tokens above 0 and at most 1.")
        object.__setattr__(self, "model", self.model.strip())
        object.__setattr__(self, "max_new_tokens", int(self.max_new_tokens))
        object.__setattr__(self, "keep", float(self.keep))

    @property
    def runs(self):
        """The arguments of the pipeline for each run, by name."""
        pruned = {"pruned": {"prune": self.method, "keep": self.keep}}
        return {**pruned, "whole": {}} if self.compare and self.keep != 1 else pruned


@dataclasses.dataclass(frozen=True)
class Reading:
    """Where an inquiry stands.

    Args:
        image: as it was read, or `None` while the model is being loaded.
        pruned, whole: the answers of both runs so far, `None` before they have chosen their tokens.
        answered: names of the runs that are over.
    """

    image: object = None
    pruned: object = None
    whole: object = None
    answered: tuple[str, ...] = ()


def read(inquiry):
    """Follow an inquiry: an asynchronous iterator over `Reading`, the last one finished.

    Raises:
        StudioError: the image or the model cannot be read, or the model refuses the inquiry.
    """
    return follow(lambda job: _read(inquiry, job))


@on_gpu(seconds=60)
def _read(inquiry, job):
    from studio.images import open_image

    image = open_image(inquiry.image, Path(inquiry.image).name, limits().pixels)
    job.report(Reading())
    pipe = get_reader(inquiry.model, job.device)
    reading = Reading(image)
    job.report(reading)
    for name, settings in inquiry.runs.items():
        if not job.stopped:
            answer = pipe(
                image,
                inquiry.question,
                max_new_tokens=inquiry.max_new_tokens,
                on_step=_reporter(job, reading, name),
                **settings,
            )
            reading = dataclasses.replace(reading, **{name: answer}, answered=(*reading.answered, name))
    return reading


def _reporter(job, reading, name):
    """What a pipeline tells of its answer so far; it stops when nobody waits any more."""

    def on_step(answer):
        job.report(dataclasses.replace(reading, **{name: answer}))
        return job.stopped

    return on_step
