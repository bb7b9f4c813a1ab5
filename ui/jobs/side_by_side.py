"""Two decodings sample the same image side by side: they take turns, and each has its own clock."""

import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from studio import DECODINGS
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Call, as_files
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Pace, Sketch, partial_images
from studio.ui.server.models import fitting_decodings, get_pipeline
from studio.ui.server.worker import Job, follow
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    from PIL.Image import Image

_TURN = 0.03  # seconds that one clock may be ahead of the other


@dataclasses.dataclass(frozen=True)
class Run:
    """The state of one decoding.

    Args:
        title: of the decoding.
        total, sampled: tokens.
        clock: seconds that it has run.
        image: the latest preview, or `None`.
        trace: of its drafts.
        stats: those of the pipeline, once it is done.
    """

    title: str
    total: int
    sampled: int = 0
    clock: float = 0.0
    image: "Image | None" = None
    trace: DraftTrace | None = None
    stats: Any = None


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The state of both decodings, plain decoding first; no runs while the model is being loaded."""

    runs: tuple[Run, ...] = ()
    warning: str | None = None

    @property
    def finished(self) -> bool:
        return bool(self.runs) and all(run.stats for run in self.runs)


def side_by_side(request: GenerateRequest) -> AsyncIterator[SideBySide]:
    """Sample one image by plain decoding and by the decoding of a request, with the same seed.

    For plain decoding itself, the other is the next decoding that fits the model; for the faster of plain and Jacobi
    decoding, it is Jacobi decoding. The two never run at the same time: the one whose clock is behind runs, so the
    clocks advance together and each shows the seconds that its decoding takes alone.

    Yields:
        The state so far; the last one is finished.

    Raises:
        StudioError: the model has plain decoding only, cannot be loaded, or refuses the request.
    """
    if request.decoding == "exact":
        request = dataclasses.replace(request, decoding="jacobi")
    request = _with_other(request)
    return follow(lambda job: _side_by_side(request, job), images=2)


def _with_other(request: GenerateRequest) -> GenerateRequest:
    """The request with a decoding that is not plain."""
    if request.decoding != request.plain:
        return request
    pipeline = DECODINGS[request.plain].pipeline
    others = [name for name in fitting_decodings(request.model) if DECODINGS[name].pipeline == pipeline]
    if not (others := [name for name in others if name not in (request.plain, "exact")]):
        raise StudioError("This model has one decoding only: there is nothing to compare it with.")
    return dataclasses.replace(request, decoding=others[0], options={})


@on_gpu(seconds=120)
def _side_by_side(request: GenerateRequest, job: Job) -> SideBySide:
    job.report(SideBySide())
    pipe = get_pipeline(request.model, job.device)
    requests = (
        dataclasses.replace(request, count=1, decoding=request.plain, options={}),
        dataclasses.replace(request, count=1),
    )
    track = _TwoRuns([Call(pipe, each) for each in requests], job)
    with ThreadPoolExecutor(len(requests), thread_name_prefix="studio-side") as threads:
        for done in [threads.submit(track.run, number) for number in range(len(requests))]:
            done.result()
    return track.state


class _TwoRuns:
    """Runs two calls in two threads that take turns."""

    def __init__(self, calls: Sequence[Call], job: Job) -> None:
        self.calls, self.job = calls, job
        self.state = SideBySide(tuple(Run(call.request.title, call.total) for call in calls), calls[-1].warning)
        self.turns = TurnScheduler(len(calls))
        self.failed = False

    def run(self, number: int) -> None:
        """Make the call with this index."""
        call, pace = self.calls[number], Pace()

        def on_step(sketch: Sketch) -> bool:
            self.turns.stop(number)
            if not self._is_over():
                self._update(number, sampled=sketch.sampled)
                if sketch.sampled < call.total and pace.is_due():
                    start = time.monotonic()
                    self._update(number, image=partial_images(call.pipe, sketch)[0], trace=_trace(call, sketch))
                    pace.spent(time.monotonic() - start)
                self.job.report(self.state)
            self.turns.go(number)
            return self._is_over()

        self.turns.go(number)
        try:
            output = call(on_step)
            self.turns.stop(number)
            if not self._is_over():
                ended = {"sampled": call.total, "trace": _trace(call, Sketch(output.tokens)), "stats": output.stats}
                self._update(number, image=as_files(output.images, call.request)[0], **ended)
                self.job.report(self.state)
        except BaseException:
            self.failed = True
            raise
        finally:
            self.turns.leave(number)

    def _is_over(self) -> bool:
        return self.job.stopped or self.failed

    def _update(self, number: int, **changes: Any) -> None:
        runs = [*self.state.runs]
        runs[number] = dataclasses.replace(runs[number], clock=self.turns.clocks[number], **changes)
        self.state = dataclasses.replace(self.state, runs=tuple(runs))


def _trace(call: Call, sketch: Sketch) -> DraftTrace:
    return call.trace(sketch) or DraftTrace(call.total, sketch.sampled, positions=sketch.positions)


class TurnScheduler:
    """Lets one of several threads run at a time, the one whose clock is behind.

    A clock runs between `go` and `stop`.

    Args:
        count: the number of threads.
    """

    def __init__(self, count: int) -> None:
        self.clocks = [0.0] * count
        self._remaining = set(range(count))
        self._active, self._started = 0, 0.0
        self._changed = threading.Condition()

    def go(self, number: int) -> None:
        """Wait for the turn of a thread, and start its clock."""
        with self._changed:
            self._choose()
            self._changed.wait_for(lambda: self._active == number)
            self._started = time.perf_counter()

    def stop(self, number: int) -> None:
        """Stop the clock of a thread; no other runs before its next `go` or `leave`."""
        self.clocks[number] += time.perf_counter() - self._started

    def leave(self, number: int) -> None:
        """Take a thread out of the turns."""
        with self._changed:
            self._remaining.discard(number)
            self._choose()

    def _choose(self) -> None:
        """Choose the thread that runs: the same one until its clock is clearly ahead."""
        if not self._remaining:
            return
        behind = min(self._remaining, key=lambda number: self.clocks[number])
        active = self._active
        if active not in self._remaining or self.clocks[active] > self.clocks[behind] + _TURN:
            self._active = behind
        self._changed.notify_all()
