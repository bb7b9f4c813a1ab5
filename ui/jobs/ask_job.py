"""The work behind the Ask tab: a question about an image, answered by a vision-language model."""

import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import pruning_methods
from studio.checks import as_integer, check_choice, check_flag, check_integer, check_number, set_fields
from studio.errors import StudioError
from studio.ui.server.limits import check_model, check_user_text, limits
from studio.ui.server.models import get_reader
from studio.ui.server.worker import Job, follow
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio.pipelines.visual_question import Answer

_MOST_TOKENS = 4096  # of an answer, where no limit is set


@dataclasses.dataclass(frozen=True)
class AskRequest:
    """A question about an image.

    Args:
        model: what `studio.load` takes.
        image: the path of its file.
        question: the text.
        method: the pruning method, of `studio.pruning_methods`.
        keep: the fraction of visual tokens to keep, above 0 and at most 1.
        compare: whether to ask the same with all tokens afterwards.
        max_new_tokens: of the answer, at least 1.

    Raises:
        StudioError: a value is missing or outside its range.
    """

    model: str
    image: str
    question: str
    method: str = "divprune"
    keep: float = 0.2
    compare: bool = True
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.model in (None, "") or not check_model(self.model).strip():
            raise StudioError(
                "Name a model that reads images: a Hugging Face id, a folder, or what "
                "`studio train --preset emoji-vlm` made."
            )
        if not self.image:
            raise StudioError("Give an image first: drop a file on the field, or take an example.")
        if self.question is None or not check_user_text("The question", self.question).strip():
            raise StudioError("The question is empty: ask something about the image.")
        check_choice("The pruning method", self.method, pruning_methods())
        answer = limits().answer
        most = _MOST_TOKENS if answer is None else answer
        set_fields(
            self,
            model=self.model.strip(),
            compare=check_flag("Whether to compare", self.compare),
            max_new_tokens=check_integer("The longest answer, in tokens,", as_integer(self.max_new_tokens), 1, most),
            keep=float(check_number("The fraction of tokens to keep", self.keep, 0, 1, above=True)),
        )

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The arguments of the pipeline for each run, by name."""
        pruned: dict[str, dict[str, Any]] = {"pruned": {"prune": self.method, "keep": self.keep}}
        return {**pruned, "whole": {}} if self.compare and self.keep != 1 else pruned


@dataclasses.dataclass(frozen=True)
class Reading:
    """The state of an `AskRequest`.

    Args:
        image: as it was read, or `None` while the model is being loaded.
        pruned, whole: the answers of both runs so far, `None` before their tokens are chosen.
        answered: the names of the runs that are done.
    """

    image: "Image | None" = None
    pruned: "Answer | None" = None
    whole: "Answer | None" = None
    answered: tuple[str, ...] = ()


def read(request: AskRequest) -> AsyncIterator[Reading]:
    """Follow a request.

    Yields:
        The state so far; the last one is finished.

    Raises:
        StudioError: the image or the model cannot be read, or the model refuses the request.
    """
    return follow(lambda job: _read(request, job))


@on_gpu(seconds=60)
def _read(request: AskRequest, job: Job) -> Reading:
    from studio.images import open_image

    image = open_image(request.image, Path(request.image).name, limits().pixels)
    job.report(Reading())
    pipe = get_reader(request.model, job.device)
    reading = Reading(image)
    job.report(reading)
    for name, settings in request.runs.items():
        if not job.stopped:
            answer = pipe(
                image,
                request.question,
                max_new_tokens=request.max_new_tokens,
                on_step=_reporter(job, reading, name),
                **settings,
            )
            reading = dataclasses.replace(reading, **{name: answer}, answered=(*reading.answered, name))
    return reading


def _reporter(job: Job, reading: Reading, name: str) -> "Callable[[Answer], bool]":
    """A callback that reports the answer so far, and stops the pipeline when nobody waits any more."""

    def on_step(answer: "Answer") -> bool:
        job.report(dataclasses.replace(reading, **{name: answer}))
        return job.stopped

    return on_step
