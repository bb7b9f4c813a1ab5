"""Long work of the app: one thread for each device, which has its models; event handlers follow the work.

Handlers are asynchronous generators over `follow`. When one is cancelled or closed, or its session is lost, the job's
stop flag is set, and the work ends at its next step.
"""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Any

from studio.errors import StudioError
from studio.ui.server.models import Device
from studio.ui.server.rate_limits import RateLimiter
from studio.ui.server.scheduler import FairQueue, Overloaded, QueueLimits
from studio.ui.server.session import listening, session

_SHORTEST_PAUSE = 0.04  # seconds between two items, so that fast models do not flood the browser
_POLL = 1  # seconds between two looks at who listens
RESTART = 30  # seconds after which a server that stops may be back
CLOSING = "The server is about to stop and takes no more work: ask again when it is back."
CLOSED = "The server stopped before this was done: ask again when it is back."
_LOG = logging.getLogger(__name__)


class Job:
    """What the work sees of the client that waits for it.

    `device` says where to do the work; it is set before the work begins.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.device = Device()
        self._loop = loop
        self._news = asyncio.Event()
        self._latest: Any = None
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether nobody waits any more: finish at the next step."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Set the stop flag."""
        self._stop.set()

    def report(self, item: Any) -> None:
        """Pass an item on; it replaces the last one if that was not taken yet."""
        self._latest = item
        self._wake()

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    def _done(self, future: asyncio.Future[Any]) -> None:
        """Wake whoever waits; asking for the exception keeps asyncio from logging it."""
        if not future.cancelled():
            future.exception()
        self._news.set()

    async def _next(self) -> Any:
        """The next item, or `None` where none came for a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL):  # `wait_for` of Python 3.11 may swallow that the caller was cancelled
                await self._news.wait()
        self._news.clear()
        item, self._latest = self._latest, None
        return item


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """How a request is done in one call with others.

    Args:
        key: equal for all requests that may be batched.
        size: images that this one makes.
        request: what `run` gets of it.
        run: `run(requests, jobs)` does them all. It returns for each what it alone would return, or the error that it
            would raise.
        waiting: makes the report for a client that waits; gets the number of turns before its own, at least 1.
        continuous: does all requests of this key, and those that arrive meanwhile, in a running batch; in place of
            `run`, unless it raises an error.
    """

    key: Hashable
    size: int
    request: Any
    run: Callable[[Sequence[Any], Sequence[Any]], list[Any]]
    waiting: Callable[[int], Any]
    continuous: "Callable[[Intake], None] | None" = None


@dataclasses.dataclass(eq=False)
class QueuedRequest:
    """Work in the queue of a device."""

    work: Callable[[Job], Any]
    job: Job
    client: Hashable
    batch: BatchSpec | None
    images: int = 1
    future: Future[Any] = dataclasses.field(default_factory=Future)
    context: Context = dataclasses.field(default_factory=copy_context)

    @property
    def batch_key(self) -> Hashable:
        return self.batch and self.batch.key

    @property
    def size(self) -> int:
        return self.batch.size if self.batch else self.images


class DeviceWorker:
    """A device, its thread, and the requests that wait for it."""

    def __init__(self, device: Device, limits: QueueLimits) -> None:
        self.device, self.limits = device, limits
        self._queue: FairQueue[QueuedRequest] = FairQueue(limits)
        self._lock = threading.Lock()
        self._running: list[QueuedRequest] = []
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "studio-model", device.enter)

    @property
    def load(self) -> int:
        """The number of images that wait or are being sampled."""
        return self.waiting + self.running

    @property
    def waiting(self) -> int:
        """The number of images that wait."""
        with self._lock:
            return self._queue.images

    @property
    def running(self) -> int:
        """The number of images that are being sampled."""
        with self._lock:
            return sum(request.size for request in self._running)

    @property
    def closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def submit(self, request: QueuedRequest) -> None:
        """Let a request wait for its turn.

        Raises:
            Overloaded: the queue is full, or the worker takes no more.
        """
        with self._lock:
            if self._closing:
                raise Overloaded(CLOSING, 503, RESTART)
            self._queue.add(request)
            self._report_waiting()
        self._thread.submit(self._serve)

    def withdraw(self, request: QueuedRequest) -> None:
        """Remove a request that nobody waits for."""
        with self._lock:
            self._queue.remove(request)
            self._report_waiting()

    def close(self) -> None:
        """Take no more requests; those that wait are still done."""
        with self._lock:
            self._closing = True

    def abandon(self) -> None:
        """Refuse all requests that wait, and stop those under way."""
        with self._lock:
            waiting = self._queue.in_order()
            for request in waiting:
                self._queue.remove(request)
            for request in [*waiting, *self._running]:
                request.job.stop()
                _settle(request, Overloaded(CLOSED, 503, RESTART))

    def _serve(self) -> None:
        with self._lock:
            self._running = [each for each in self._queue.take() if each.future.set_running_or_notify_cancel()]
            self._report_waiting()
        first = self._running[0].batch if self._running else None
        if first and first.continuous:
            self._serve_continuously(first.continuous)
            return
        results = _results(self._running, self.device) if self._running else []
        with self._lock:
            for request, result in zip(self._running, results):
                _settle(request, result)
            self._running = []

    def _serve_continuously(self, serve: "Callable[[Intake], None]") -> None:
        """Do the requests under way and those that join them; where that fails, each is done alone."""
        intake = Intake(self)
        try:
            self._running[0].context.copy().run(serve, intake)
        except BaseException as error:
            _LOG.error("A running batch failed; %d requests are done alone", len(self._running), exc_info=error)
            for request in list(self._running):
                intake.finish(request, _result(request))

    def take_more(self, batch_key: Hashable, room: int) -> list[QueuedRequest]:
        """Take the next requests in turn that may join those under way."""
        taken: list[QueuedRequest] = []
        with self._lock:
            while (request := self._queue.take_next(batch_key, room)) is not None:
                if request.future.set_running_or_notify_cancel():
                    room -= request.size
                    taken.append(request)
            self._running += taken
            if taken:
                self._report_waiting()
        return taken

    def finish(self, request: QueuedRequest, result: Any) -> None:
        """Give a request under way its result or its error."""
        with self._lock:
            _settle(request, result)
            self._running.remove(request)

    @property
    def under_way(self) -> list[QueuedRequest]:
        """The requests under way."""
        return list(self._running)

    def _report_waiting(self) -> None:
        """Tell each client that waits how many turns come before its own, the one under way included."""
        for ahead, request in enumerate(self._queue.in_order(), bool(self._running)):
            if request.batch and ahead:
                request.job.report(request.batch.waiting(ahead))


class Intake:
    """The requests of a running batch: those under way at first, then those that may join them."""

    def __init__(self, worker: DeviceWorker) -> None:
        self._worker, self._first = worker, worker.under_way
        self._key, self.device = self._first[0].batch_key, worker.device
        self.most = max(worker.limits.max_batch, sum(request.size for request in self._first))

    def take(self, room: int) -> list[QueuedRequest]:
        """The next requests, with at most `room` images."""
        taken, self._first = self._first, []
        taken += self._worker.take_more(self._key, room - sum(request.size for request in taken))
        for request in taken:
            request.job.device = self.device
        return taken

    def finish(self, request: QueuedRequest, result: Any) -> None:
        """Give a request its result or its error."""
        self._worker.finish(request, result)


def _settle(request: QueuedRequest, result: Any) -> None:
    """Give a request its result or its error, unless it has one or was withdrawn."""
    with suppress(InvalidStateError):
        if isinstance(result, BaseException):
            request.future.set_exception(result)
        else:
            request.future.set_result(result)


def _results(requests: list[QueuedRequest], device: Device) -> list[Any]:
    """The results of one batch, errors too. Where a call for several fails, each is done again alone."""
    for request in requests:
        request.job.device = device
    batches = [request.batch for request in requests if request.batch]
    if len(batches) > 1:
        context, jobs = requests[0].context, [request.job for request in requests]
        try:
            return context.run(batches[0].run, [batch.request for batch in batches], jobs)
        except BaseException as error:
            _LOG.error("A call for %d requests failed; each is done alone", len(requests), exc_info=error)
    return [_result(request) for request in requests]


def _result(request: QueuedRequest) -> Any:
    try:
        return request.context.run(request.work, request.job)
    except BaseException as error:
        return error


_workers = [DeviceWorker(Device(), QueueLimits())]
_rates = RateLimiter()


def use_workers(workers: Sequence[DeviceWorker], rates: RateLimiter | None = None) -> None:
    """Do all work from now on there, each request by the least busy worker with room, as often as `rates` allows."""
    global _rates
    _workers[:], _rates = workers, rates or RateLimiter()


def workers() -> list[DeviceWorker]:
    """The workers of this process."""
    return _workers


def is_closing() -> bool:
    """Whether no more work is taken."""
    return any(each.closing for each in _workers)


def is_continuous() -> bool:
    """Whether requests may join a running batch."""
    return bool(_workers) and all(each.limits.continuous for each in _workers)


def is_idle() -> bool:
    """Whether nothing waits or is being done."""
    return not any(each.load for each in _workers)


def drain(seconds: float) -> bool:
    """Take no more work, give what there is so many seconds, and refuse the rest.

    Args:
        seconds: how long to wait, at least 0.

    Returns:
        Whether all work was done in time.
    """
    for each in _workers:
        each.close()
    ends = time.monotonic() + seconds
    while not (idle := is_idle()) and time.monotonic() < ends:
        time.sleep(_SHORTEST_PAUSE)
    for each in _workers:
        each.abandon()
    return idle


def _submit(request: QueuedRequest) -> DeviceWorker:
    """Put a request into the queue of a worker that has room, and return that worker."""
    _rates.check(request.client, request.size)
    refusals = []
    for each in sorted(_workers, key=lambda each: each.load):
        try:
            each.submit(request)
            _rates.count(request.client, request.size)
            return each
        except StudioError as error:
            refusals.append(error)
    raise refusals[0]


async def follow(work: Callable[[Job], Any], batch: BatchSpec | None = None, *, images: int = 1) -> AsyncIterator[Any]:
    """Run `work(job)` in the thread of a device, with the caller's context variables, when its turn comes.

    Args:
        work: does the request alone.
        batch: how it is done together with others; `None`: only alone.
        images: that are counted for a request without `batch`.

    Yields:
        The items it reports, the newest only, and at last what it returns.

    Raises:
        Overloaded: the queue is full, the client asks too often, or the server stops.
        StudioError: nobody listens any more.
        Exception: whatever the work raises.
    """
    is_heard = listening()
    job = Job(asyncio.get_running_loop())
    request = QueuedRequest(work, job, session(), batch, images)
    chosen = _submit(request)
    future = asyncio.wrap_future(request.future)
    future.add_done_callback(job._done)
    try:
        while not future.done():
            if (item := await job._next()) is not None and not future.done():
                yield item
                await asyncio.sleep(_SHORTEST_PAUSE)
            if not is_heard():
                raise StudioError("Nobody listened for the answer: this request was dropped.")
        if isinstance(future.exception(), StudioError):
            _rates.forget(request.client, request.size)
        yield future.result()
    finally:
        job.stop()
        future.cancel()
        chosen.withdraw(request)
