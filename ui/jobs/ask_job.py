"""The work behind the Ask tab: a question about an image, answered by a vision-language model."""

import dataclasses
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from studio import compression_methods, merging_methods, pruning_methods, pruning_place
from studio.checks import (
    as_integer,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_text,
    set_fields,
    shown,
)
from studio.errors import StudioError
from studio.ui.server.limits import check_model, check_user_text, limits
from studio.ui.server.models import get_reader
from studio.ui.server.worker import Job, follow
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    from PIL.Image import Image

    from studio.pipelines.visual_question import Answer, ImageMemory, VisualQuestionPipeline

_MOST_TOKENS = 4096  # of an answer, where no limit is set
_NUMBERS, _LONGEST_MERGE = "The numbers of merging", 1000  # characters

_CACHE = "kv-"
QUECC, _TOKENS = "quecc", 16
"""The method that makes tokens for the question, and how many where none are given."""


def ask_methods() -> dict[str, str]:
    """The methods of the tab, with a line of description: of pruning, "quecc", and with "kv-" before it compression."""
    made = "A few tokens that are made for the question (QueCC): for a reader with a compressor, such as emoji-vlm."
    return {**pruning_methods(), QUECC: made, **{_CACHE + name: line for name, line in compression_methods().items()}}


def place_of(method: str | None) -> str:
    """Where a method of the tab takes tokens away; "nowhere" for `None`."""
    if method is None:
        return "nowhere"
    if method == QUECC:
        return "made for the question"
    return "KV cache" if method.startswith(_CACHE) else pruning_place(method)


def merge_of(method: str | None, numbers: str | None) -> str | None:
    """What `AskRequest.merge` takes, from a method of `studio.merge_tokens` and its numbers; `None` without one.

    Raises:
        StudioError: another method, or tome with the numbers of another one.
    """
    if not method:
        return None
    check_choice("The method that merges tokens", method, merging_methods())
    numbers = check_text(_NUMBERS, numbers or "", _LONGEST_MERGE).strip()
    if method != "tome":
        return f"{method}:{numbers}" if numbers else method
    if numbers.startswith("diffrate"):
        raise StudioError(f"tome takes numbers of tokens, such as 36,28,20, not {shown(numbers)}.")
    return numbers


@dataclasses.dataclass(frozen=True)
class AskRequest:
    """A question about an image.

    Args:
        model: what `studio.load` takes.
        image: the path of its file, or its bytes.
        question: the text.
        method: of `ask_methods`; `None` keeps all tokens.
        keep: the fraction of visual tokens to keep, above 0 and at most 1; not for "quecc".
        compare: whether to ask the same with all tokens afterwards.
        max_new_tokens: of the answer, at least 1.
        tokens: as many as "quecc" makes of the image, 16 where none are given; for no other method.
        merge: tokens that the vision tower merges, as text, as a call of the pipeline takes it; `None` merges none.

    Raises:
        StudioError: a value is missing or outside its range.
    """

    model: str
    image: str | bytes
    question: str
    method: str | None = "divprune"
    keep: float = 0.2
    compare: bool = True
    max_new_tokens: int = 64
    tokens: int | None = None
    merge: str | None = None

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
        if self.method is not None:
            check_choice("The pruning method", self.method, ask_methods())
        tokens = as_integer(self.tokens)
        if self.method == QUECC:
            tokens = check_integer("The number of tokens", _TOKENS if tokens is None else tokens, 1)
        elif tokens is not None:
            raise StudioError("The number of tokens is for quecc: choose that method, or leave the number out.")
        if self.merge is not None:
            check_text(_NUMBERS, self.merge, _LONGEST_MERGE)  # its form is checked beside the model
        answer = limits().answer
        most = _MOST_TOKENS if answer is None else answer
        set_fields(
            self,
            model=self.model.strip(),
            tokens=tokens,
            compare=check_flag("Whether to compare", self.compare),
            max_new_tokens=check_integer("The longest answer, in tokens,", as_integer(self.max_new_tokens), 1, most),
            keep=float(check_number("The fraction of tokens to keep", self.keep, 0, 1, above=True)),
        )

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of the runs: "pruned" or merged, and "whole" with all tokens."""
        if self.method is None and self.merge is None:
            return ("whole",)
        is_other = self.is_pruned or self.merge is not None
        return ("pruned", "whole") if self.compare and is_other else ("pruned",)

    @property
    def is_pruned(self) -> bool:
        """Whether the language model gets fewer tokens than the image has."""
        return self.method is not None and (self.keep < 1 or self.method == QUECC)

    @property
    def share(self) -> str:
        """What the pruned run reads of the tokens, in words."""
        if not self.is_pruned:
            return "all tokens"
        return f"{self.keep:.0%} of the tokens" if self.tokens is None else f"{self.tokens} tokens"


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

    def with_answer(self, run: str, answer: "Answer") -> "Reading":
        """With the answer of a run."""
        changes: dict[str, Any] = {run: answer}
        return dataclasses.replace(self, **changes)


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
    from studio.images import open_image, read_image

    if isinstance(request.image, bytes):
        image = read_image(request.image, "The image", limits().pixels)
    else:
        image = open_image(request.image, Path(request.image).name, limits().pixels)
    job.report(Reading())
    pipe = get_reader(request.model, job.device)
    if request.merge is not None:
        with pipe.merging(request.merge):  # refused before anything is answered
            pass
    if request.tokens is not None:
        pipe.compressor_of().check_tokens(request.tokens)
    reading = Reading(image)
    job.report(reading)
    for name in request.runs:
        if not job.stopped:
            answer = _answer(pipe, image, request, name, _reporter(job, reading, name))
            reading = dataclasses.replace(reading.with_answer(name, answer), answered=(*reading.answered, name))
    return reading


def _answer(
    pipe: "VisualQuestionPipeline", image: "Image", request: AskRequest, name: str, on_step: "Callable[[Answer], bool]"
) -> "Answer":
    longest: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "on_step": on_step}
    if name == "whole":
        return pipe(image, request.question, **longest)
    merge = 0 if request.merge is None else request.merge
    if request.method is None or not request.method.startswith(_CACHE):
        how: dict[str, Any] = {} if request.method is None else {"prune": request.method, "keep": request.keep}
        how = how if request.tokens is None else {"tokens": request.tokens}
        return pipe(image, request.question, **how, merge=merge, **longest)
    memory, spent = _remembered(pipe, image, request.method.removeprefix(_CACHE), request.keep, merge)
    answer = pipe.ask(memory, request.question, **longest)
    return dataclasses.replace(answer, seconds={**answer.seconds, "encode": spent})


_memories: "WeakKeyDictionary[VisualQuestionPipeline, dict[tuple, ImageMemory]]" = WeakKeyDictionary()
_MOST_MEMORIES, _MOST_BYTES = 8, 2**30


def _remembered(
    pipe: "VisualQuestionPipeline", image: "Image", method: str, keep: float, merge: int | str
) -> "tuple[ImageMemory, float]":
    """The compressed cache of an image, and the seconds that it took now: 0 where an earlier question made it.

    The latest eight stay, of at most 1 GiB together. They depend on the image alone, so sessions share them.
    """
    memories = _memories.setdefault(pipe, {})
    pixels = blake2b(image.tobytes(), digest_size=16).hexdigest()
    key = (pixels, image.mode, image.size, merge, method, keep)
    spent = 0.0
    if key not in memories:
        memories[key] = pipe.remember(image, method=method, keep=keep, merge=merge)
        spent = memories[key].seconds["remember"]
    memory = memories[key] = memories.pop(key)
    while len(memories) > 1 and (
        len(memories) > _MOST_MEMORIES or sum(each.cache_bytes for each in memories.values()) > _MOST_BYTES
    ):
        del memories[next(iter(memories))]
    return memory, spent


def _reporter(job: Job, reading: Reading, name: str) -> "Callable[[Answer], bool]":
    """A callback that reports the answer so far, and stops the pipeline when nobody waits any more."""

    def on_step(answer: "Answer") -> bool:
        job.report(reading.with_answer(name, answer))
        return job.stopped

    return on_step
