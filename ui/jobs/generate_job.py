"""The work behind the Generate tab: requests sampled in one call of a pipeline, with previews."""

import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from studio import decoding_named
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace, trace_drafts, traced
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Pace, Sketch, partial_images
from studio.ui.server.models import get_pipeline
from studio.ui.server.worker import BatchSpec, Job, follow
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[Sketch], bool]


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
    """

    sampled: int = 0
    total: int = 0
    seconds: float = 0.0
    images: "list[Image] | None" = None
    trace: DraftTrace | None = None
    warning: str | None = None
    ahead: int | None = None


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A finished request.

    Args:
        images: with their settings as metadata.
        stats: those of the pipeline, with the tokens of these images only.
        trace, warning: as of `Progress`.
        batch_size: images that were sampled in the same call, those of other clients included.
    """

    images: "list[Image]"
    stats: Any
    trace: DraftTrace | None = None
    warning: str | None = None
    batch_size: int = 1


class Call:
    """One call of a pipeline for requests of one `batch_key`; drafts are traced where the decoding makes any.

    Args:
        pipe: samples.
        requests: at least one.

    Raises:
        StudioError: the pipeline does not take these settings.
    """

    def __init__(self, pipe: Any, *requests: GenerateRequest) -> None:
        self.pipe, self.requests, self.total = pipe, requests, pipe.transformer.num_tokens
        self.request = request = requests[0]
        pipe.check_arguments(request.settings)
        self.decoding = decoding_named(request.decoding).settings(**request.options)
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
        prompts = [request.prompt for request in self.requests for _ in request.seeds]
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
            prompts,
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
        self.pipe.check_call(self.request.prompt, decoding=self.decoding, **self.request.settings)

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


def as_files(
    images: "Sequence[Image]", request: GenerateRequest, record: dict[str, Any] | None = None
) -> "list[Image]":
    """Finished images of a request as PNGs with their settings as metadata, which the app serves unchanged.

    `record` takes the place of that of the request.
    """
    from PIL import Image

    from studio.saving import png_writer

    originals: list[Image] = []
    for image, seed in zip(images, request.seeds):
        file = BytesIO()
        png_writer(image, record or request.record, seed)(file)
        originals.append(Image.open(file))
    return originals


def sample(request: GenerateRequest) -> AsyncIterator[Progress | Sampled]:
    """Follow a request.

    Yields:
        `Progress` and, at last, a `Sampled`.

    Raises:
        StudioError: the model cannot be loaded or refuses the request, or the queue is full.
    """
    batch = BatchSpec(request.batch_key, request.count, request, sample_together, lambda ahead: Progress(ahead=ahead))
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
    samples: list[_Sampling] = []
    for number, (request, job) in enumerate(zip(requests, jobs)):
        try:
            call = Call(pipe, request)
            call.check()
            samples.append(_Sampling(number, job, call))
        except StudioError as error:
            results[number] = error
    if samples:
        for sampling, sampled in zip(samples, _sampled(pipe, samples)):
            results[sampling.number] = sampled
    return results


class _Sampling:
    """One request of a batch.

    Args:
        number: its index among the requests.
        job: that of the request.
        call: the call that would sample it alone.
    """

    def __init__(self, number: int, job: Job, call: Call) -> None:
        self.number, self.job, self.request, self.warning = number, job, call.request, call.warning
        self.latest = Progress(total=call.total, warning=self.warning)
        job.report(self.latest)

    def update(self, **changes: Any) -> None:
        self.latest = dataclasses.replace(self.latest, **changes)
        self.job.report(self.latest)


def _sampled(pipe: Any, samples: Sequence[_Sampling]) -> list[Sampled]:
    """The result of each request, after one call for all of them."""
    call = Call(pipe, *(sampling.request for sampling in samples))
    pace = Pace()
    began: float | None = None

    def is_over() -> bool:
        return all(sampling.job.stopped for sampling in samples)

    def on_step(sketch: Sketch) -> bool:
        nonlocal began
        began = began or time.monotonic()
        if not is_over():
            previews: list[dict[str, Any]] = [{}] * len(samples)
            if sketch.sampled < call.total and pace.is_due():
                start = time.monotonic()
                images = partial_images(pipe, sketch)
                previews = [
                    {"images": images[rows], "trace": call.trace(sketch, place)} for place, rows in enumerate(call.rows)
                ]
                pace.spent(time.monotonic() - start)
            seconds = time.monotonic() - began
            for sampling, preview in zip(samples, previews):
                sampling.update(sampled=sketch.sampled, seconds=seconds, **preview)
        return is_over()

    output = call(on_step)
    sketch, batch_size = Sketch(output.tokens), len(output.tokens)
    results = []
    for place, (sampling, rows) in enumerate(zip(samples, call.rows)):
        stats = dataclasses.replace(output.stats, tokens=output.stats.tokens * sampling.request.count // batch_size)
        images = [] if sampling.job.stopped else as_files(output.images[rows], sampling.request)
        results.append(Sampled(images, stats, call.trace(sketch, place), sampling.warning, batch_size))
    return results
