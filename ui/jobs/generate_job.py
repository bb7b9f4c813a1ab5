"""The work behind the Generate tab: requests sampled in one call of a pipeline, with previews."""

import dataclasses
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from studio import decoding_named
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace, trace_drafts, traced
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Pace, Sketch, partial_images
from studio.ui.server import metrics
from studio.ui.server.models import get_pipeline
from studio.ui.server.worker import BatchSpec, Job, follow, is_continuous
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[Sketch], bool]
_REPORT_PAUSE = 0.02  # seconds between two reports without a preview


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a request under way.

    Args:
        sampled, total: tokens per image; `total` is 0 while the model is being loaded.
        seconds: since the first token.
        images: the latest preview, RGBA, or `None`; the same list until there is a newer one.
        trace: the drafts of the first image, where drafts are made; the same object until there is a newer one.
        warning: a note for the user, or `None`.
        ahead: the most turns that come before its own while it waits; else `None`.
        partials: all previews so far, where the request asks for a number of them.
    """

    sampled: int = 0
    total: int = 0
    seconds: float = 0.0
    images: "list[Image] | None" = None
    trace: DraftTrace | None = None
    warning: str | None = None
    ahead: int | None = None
    partials: "tuple[list[Image], ...]" = ()


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A finished request.

    Args:
        images: with their settings as metadata.
        stats: those of the pipeline, with the tokens of these images only.
        trace, warning: as of `Progress`.
        batch_size: images that were sampled in the same call, those of other clients included.
        partials: as of `Progress`.
        prompt_tokens: tokens of the prompt.
    """

    images: "list[Image]"
    stats: Any
    trace: DraftTrace | None = None
    warning: str | None = None
    batch_size: int = 1
    partials: "tuple[list[Image], ...]" = ()
    prompt_tokens: int = 0


class Call:
    """One call of a pipeline for requests of one `batch_key`; drafts are traced where the decoding makes any.

    Args:
        pipe: samples.
        requests: at least one.
        traces: whether drafts are traced.

    Raises:
        StudioError: the pipeline does not take these settings.
    """

    def __init__(self, pipe: Any, *requests: GenerateRequest, traces: bool = True) -> None:
        self.pipe, self.requests, self.total = pipe, requests, pipe.transformer.num_tokens
        self.request = request = requests[0]
        pipe.check_arguments(request.settings)
        self.decoding = decoding_named(request.decoding).settings(**request.options)
        self.rounds = None
        if traces:
            self.decoding, self.rounds = traced(self.decoding, [rows.start for rows in self.rows])

    @property
    def warning(self) -> str | None:
        """A note for the user, or `None`."""
        from studio.checkpoints.vocabulary import prompt_warning

        notes = prompt_warning(self.pipe, self.request.prompt), self.pipe.validation_warning(self.decoding)
        return " ".join(filter(None, notes)) or None

    def __call__(self, on_step: OnStep) -> Any:
        """Sample; `on_step` gets a `Sketch` after each step and returns True to stop."""
        import torch

        shown = [name for name in ("tokens", "positions") if name in self.pipe._callback_tensor_inputs]
        name, _ = subject_of(self.pipe, self.request)
        subjects = [subject_of(self.pipe, request)[1] for request in self.requests for _ in request.seeds]
        seeds = [seed for request in self.requests for seed in request.seeds]
        known = torch.zeros(len(seeds), self.total, dtype=torch.bool)

        def after_step(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            tokens = tensors["tokens"]
            if "positions" in tensors:
                known.scatter_(1, tensors["positions"].cpu(), True)
                sketch = Sketch(tokens, known)
            else:
                sketch = Sketch(tokens, (tokens >= 0).any(dim=2) if tokens.ndim == 3 else None)
            if on_step(sketch):
                pipe._interrupt = True
            return tensors

        return self.pipe(
            **{name: subjects},
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            decoding=self.decoding,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=shown,
            **self.request.settings,
        )

    def check(self) -> None:
        """Check the request before it is sampled.

        Raises:
            StudioError: a call would refuse it.
        """
        name, subject = subject_of(self.pipe, self.request)
        self.pipe.check_call(**{name: subject}, decoding=self.decoding, **self.request.settings)
        side = self.pipe.image_tokenizer.config.sample_size
        if self.request.size not in (None, f"{side}x{side}"):
            raise StudioError(f"The size of this model's images is {side}x{side}: leave size out, or ask for that.")

    @property
    def rows(self) -> list[slice]:
        """The images of each request, as slices of the batch."""
        ends = list(itertools.accumulate(request.count for request in self.requests))
        return [slice(end - request.count, end) for end, request in zip(ends, self.requests)]

    def trace(self, sketch: Sketch, number: int = 0) -> DraftTrace | None:
        """The drafts of the first image of the request with this index; `None` where the decoding makes none."""
        if self.rounds is None or (not self.rounds[number] and sketch.sampled > 1):
            return None
        return trace_drafts(self.rounds[number], sketch.tokens[self.rows[number].start].tolist(), self.total)


def subject_of(pipe: Any, request: GenerateRequest) -> tuple[str, Any]:
    """What a pipeline is asked for: the name of its argument, and the prompt or the number of a class.

    Where a request for a class-conditional model has a prompt only, that names the class.

    Raises:
        StudioError: no such class, none at all, or one for a text-conditional model.
    """
    if request.class_label is None and pipe.takes_text:
        return "prompt", request.prompt
    if request.class_label is None and not request.prompt.strip():
        raise StudioError("This model is class-conditional: choose a class, by its name or its number.")
    return "class_labels", pipe.class_index(request.prompt if request.class_label is None else request.class_label)


def as_files(
    images: "Sequence[Image]", request: GenerateRequest, record: dict[str, Any] | None = None
) -> "list[Image]":
    """Finished images of a request as PNGs with their settings as metadata, which the app serves unchanged.

    `record` takes the place of that of the request.
    """
    import PIL.Image

    from studio.saving import png_writer

    originals: list[Image] = []
    for image, seed in zip(images, request.seeds):
        file = BytesIO()
        png_writer(image, record or request.record, seed)(file)
        originals.append(PIL.Image.open(file))
    return originals


def sample(request: GenerateRequest) -> AsyncIterator[Progress | Sampled]:
    """Follow a request.

    Yields:
        `Progress` and, at last, a `Sampled`.

    Raises:
        StudioError: the model cannot be loaded or refuses the request, or the queue is full.
    """
    request.check_subject()
    key, continuous = request.batch_key, None
    if is_continuous() and request.joins:
        from studio.ui.jobs.continuous_job import sample_continuously

        key, continuous = f"running {request.model}", sample_continuously
    batch = BatchSpec(key, request.count, request, sample_together, lambda ahead: Progress(ahead=ahead), continuous)
    return follow(lambda job: _sample(request, job), batch)


@on_gpu(seconds=60)
def _sample(request: GenerateRequest, job: Job) -> Sampled:
    [sampled] = sample_together([request], [job])
    if isinstance(sampled, Exception):
        raise sampled
    return sampled


def sample_together(requests: Sequence[GenerateRequest], jobs: Sequence[Job]) -> list[Any]:
    """Sample requests of one `batch_key` in one call of their pipeline.

    A request that the pipeline refuses, or that nobody waits for any more, does not keep others from being sampled.

    Args:
        requests: at least one.
        jobs: that of each.

    Returns:
        For each a `Sampled`, without images where it was stopped, or the `StudioError` that refuses it.
    """
    for job in jobs:
        job.report(Progress())
    pipe = get_pipeline(requests[0].model, jobs[0].device)
    results: list[Any] = [None] * len(requests)
    samples: list[RequestProgress] = []
    for number, (request, job) in enumerate(zip(requests, jobs)):
        try:
            call = Call(pipe, request)
            call.check()
            samples.append(RequestProgress(number, job, call))
        except StudioError as error:
            results[number] = error
    if samples:
        for sampling, sampled in zip(samples, _sampled(pipe, samples)):
            results[sampling.number] = sampled
    return results


class RequestProgress:
    """One request of a batch.

    Args:
        number: its index among the requests.
        job: that of the request.
        call: the call that would sample it alone.
    """

    def __init__(self, number: int, job: Job, call: Call) -> None:
        self.number, self.job, self.request, self.warning = number, job, call.request, call.warning
        self.prompt_tokens = call.pipe.count_prompt_tokens(call.request.prompt) if call.pipe.takes_text else 0
        self._began = 0.0
        self._reported = 0.0
        self.latest = Progress(total=call.total, warning=self.warning)
        wanted = call.request.partial_images or 0
        self._due = [math.ceil(call.total * part / (wanted + 1)) for part in range(1, wanted + 1)]
        job.report(self.latest)

    def show(
        self,
        pipe: Any,
        sampled: int,
        sketch: Callable[[], Sketch],
        paced: bool,
        trace: Callable[[], DraftTrace | None] = lambda: None,
    ) -> bool:
        """Report how far it is, with a preview where one is due.

        Args:
            pipe: samples it.
            sampled: tokens of its images.
            sketch: its images, as a preview shows them.
            paced: whether it is time for a preview of a request that wants no number of them.
            trace: its drafts.

        Returns:
            Whether there was a preview.
        """
        now = time.monotonic()
        self._began = self._began or now
        changes: dict[str, Any] = {"sampled": sampled, "seconds": now - self._began}
        if due := sampled < self.latest.total and self._is_due(sampled, paced):
            images = partial_images(pipe, sketch())
            changes |= {"images": images, "trace": trace()}
            if self.request.partial_images is not None:
                changes["partials"] = (*self.latest.partials, images)
        if due or now - self._reported > _REPORT_PAUSE:
            self.latest, self._reported = dataclasses.replace(self.latest, **changes), now
            self.job.report(self.latest)
        return due

    def _is_due(self, sampled: int, paced: bool) -> bool:
        if self.request.partial_images is None:
            return paced
        passed = [count for count in self._due if count <= sampled]
        del self._due[: len(passed)]
        return bool(passed)

    def finish(self, images: "Sequence[Image]", stats: Any, trace: DraftTrace | None, batch_size: int) -> Sampled:
        """Its result; `images` are not used where it was stopped."""
        images = [] if self.job.stopped else as_files(images, self.request)
        if images:
            metrics.count_images(self.request.model, len(images), stats.tokens)
        partials, prompt_tokens = self.latest.partials, self.prompt_tokens
        return Sampled(images, stats, trace, self.warning, batch_size, partials, prompt_tokens)


def _sampled(pipe: Any, samples: Sequence[RequestProgress]) -> list[Sampled]:
    """The result of each request, after one call for all of them."""
    call = Call(pipe, *(sampling.request for sampling in samples))
    pace = Pace()

    def is_over() -> bool:
        return all(sampling.job.stopped for sampling in samples)

    def on_step(sketch: Sketch) -> bool:
        if not is_over():
            start, paced = time.monotonic(), pace.is_due()
            shown = [
                sampling.show(
                    pipe,
                    sketch.sampled,
                    partial(sketch.of, rows),
                    paced,
                    partial(call.trace, sketch, place),
                )
                for place, (sampling, rows) in enumerate(zip(samples, call.rows))
            ]
            if any(shown):
                pace.spent(time.monotonic() - start)
        return is_over()

    output = call(on_step)
    metrics.count_call(len(output.tokens))
    metrics.count_seconds(output.stats.seconds)
    sketch, batch_size = Sketch(output.tokens), len(output.tokens)
    results = []
    for place, (sampling, rows) in enumerate(zip(samples, call.rows)):
        stats = dataclasses.replace(output.stats, tokens=output.stats.tokens * sampling.request.count // batch_size)
        results.append(sampling.finish(output.images[rows], stats, call.trace(sketch, place), batch_size))
    return results
