"""Requests of the Generate tab and the API in a running batch, which they join and leave between two steps."""

import dataclasses
import time
from typing import Any

from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Call, Progress, RequestProgress, subject_of
from studio.ui.render.preview import Pace, Sketch
from studio.ui.server import metrics
from studio.ui.server.models import get_pipeline
from studio.ui.server.worker import Intake, QueuedRequest


@dataclasses.dataclass
class _Running:
    """A request in the batch: what waits for it, what is shown of it, what it asks for, and its call in the batch."""

    request: QueuedRequest
    progress: RequestProgress
    asked: Call
    call: Any

    def sketch(self) -> Sketch:
        """Its images."""
        return Sketch(self.call.tokens, self.call.known)

    def trace(self) -> DraftTrace | None:
        """The drafts of its first image."""
        return self.asked.trace(self.sketch())


def sample_continuously(intake: Intake) -> None:
    """Sample all requests of an intake, until none is under way and none may join.

    A request that the pipeline refuses, or that fails as it joins, ends alone; one that is stopped leaves at the next
    step. An error of a step is raised: it belongs to no single request.
    """
    batch: Any = None
    pipe: Any = None
    running: list[_Running] = []
    pace = Pace()
    while True:
        for request in intake.take(intake.most if batch is None else batch.room):
            if batch is None:
                pipe = get_pipeline(_asked(request).model, intake.device)
                if not hasattr(pipe, "new_batch"):
                    raise StudioError("This model has no running batch.")  # each request is done, or refused, alone
                batch = pipe.new_batch(intake.most)
            if joined := _join(pipe, batch, request, intake):
                running.append(joined)
        for each in [each for each in running if each.request.job.stopped]:
            batch.leave(each.call)
            _leave(each, running, intake)
        if not running:
            return
        began = time.perf_counter()
        for size in batch.sizes:
            metrics.count_call(size)
        whole = batch.step()
        metrics.count_seconds({"decode": time.perf_counter() - began})
        for each in [each for each in running if each.call in whole]:
            _leave(each, running, intake)
        _show(pipe, running, pace)


def _join(pipe: Any, batch: Any, request: QueuedRequest, intake: Intake) -> _Running | None:
    """Let a request join; `None` where it fails, which it is told."""
    import torch

    asked = _asked(request)
    request.job.report(Progress())
    try:
        call = Call(pipe, asked, traces=asked.drafts)
        call.check()
        progress = RequestProgress(0, request.job, call)
        generators = [torch.Generator().manual_seed(seed) for seed in asked.seeds]
        name, subject = subject_of(pipe, asked)
        joined = batch.join(**{name: subject}, generators=generators, decoding=call.decoding, **asked.settings)
    except Exception as error:
        intake.finish(request, error)
        return None
    return _Running(request, progress, call, joined)


def _leave(each: _Running, running: list[_Running], intake: Intake) -> None:
    """End a request whose call has left the batch; one that was stopped gets no images."""
    running.remove(each)
    try:
        output = None if each.request.job.stopped else each.call.output()
        images, stats = (output.images, output.stats) if output else ([], each.call.cost())
        metrics.count_seconds({name: stats.seconds.get(name, 0.0) for name in ("text", "prefill", "pixels")})
        result: Any = each.progress.finish(images, stats, each.trace() if images else None, each.call.largest_batch)
    except Exception as error:
        result = error
    intake.finish(each.request, result)


def _show(pipe: Any, running: list[_Running], pace: Pace) -> None:
    """Report how far each request is, with previews where they are due."""
    began, paced = time.monotonic(), pace.is_due()
    shown = [each.progress.show(pipe, each.call.sampled, each.sketch, paced, each.trace) for each in running]
    if any(shown):
        pace.spent(time.monotonic() - began)


def _asked(request: QueuedRequest) -> Any:
    assert request.batch is not None, "only requests of a batch are taken"
    return request.batch.request
