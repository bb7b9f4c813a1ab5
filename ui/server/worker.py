"""Long work beside the app: one thread a device that owns the models there, followed from the event loop.

Handlers are asynchronous generators over `follow`. Cancelling one, closing it, or losing its session ends the
`await` and sets the job's stop flag, which the work sees at its next step.
"""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, copy_context

from studio.errors import StudioError
from studio.ui.server.models import Device
from studio.ui.server.scheduler import FairQueue, QueueLimits
from studio.ui.server.session import listening, session

_SHORTEST_PAUSE = 0.04  # seconds between two items, so that fast models do not flood the browser
_GLANCE = 1  # seconds between two looks at who listens
CLOSING = "The server is about to stop and takes no more work: ask again when it is back."
CLOSED = "The server stopped before this was done: ask again when it is back."
_LOG = logging.getLogger(__name__)


class Job:
    """What the work sees of the one who waits for it.

    `device` says where to do it; it is known when the work begins.
    """

    def __init__(self, loop):
        self.device = Device()
        self._loop = loop
        self._news = asyncio.Event()
        self._latest = None
        self._stop = threading.Event()

    @property
    def stopped(self):
        """Whether nobody waits any more: finish at the next step."""
        return self._stop.is_set()

    def report(self, item):
        """Pass an item on; it replaces the last one if that was not yet taken."""
        self._latest = item
        self._wake()

    def _wake(self):
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    async def _next(self):
        """The next item, or `None` where there is none for a while."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), _GLANCE)
        self._news.clear()
        item, self._latest = self._latest, None
        return item


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What lets a work be done in one call with others.

    Args:
        like: equal for all that may be.
        size: images that it makes.
        wish: what `together` gets of it.
        together: `together(wishes, jobs)` does all of them, and returns for each what its work alone would, or the
            error that this would raise.
        waiting: what is reported while it waits, of the number of turns before its own, at least 1.
    """

    like: Hashable
    size: int
    wish: object
    together: Callable
    waiting: Callable


@dataclasses.dataclass(eq=False)
class _Request:
    """A work in the queue of a device."""

    work: Callable
    job: Job
    user: Hashable
    share: BatchSpec | None
    future: Future = dataclasses.field(default_factory=Future)
    context: Context = dataclasses.field(default_factory=copy_context)

    @property
    def like(self):
        return self.share and self.share.like

    @property
    def size(self):
        return self.share.size if self.share else 1


class DeviceWorker:
    """A device, its thread, and the requests that wait for it."""

    def __init__(self, device, bounds):
        self.device = device
        self._queue, self._lock = FairQueue(bounds), threading.Lock()
        self._running, self._closing = [], False
        self._thread = ThreadPoolExecutor(1, "studio-model", device.enter)

    @property
    def load(self):
        """Images that wait or are being sampled."""
        with self._lock:
            return self._queue.images + sum(request.size for request in self._running)

    def submit(self, request):
        """Let a request wait for its turn. Errors: `StudioError` where there is no room, or no more time."""
        with self._lock:
            if self._closing:
                raise StudioError(CLOSING)
            self._queue.add(request)
            self._tell()
        self._thread.submit(self._serve)

    def withdraw(self, request):
        """Let a request go that nobody waits for."""
        with self._lock:
            self._queue.remove(request)
            self._tell()

    def close(self):
        """Take no more requests; those that wait are still done."""
        with self._lock:
            self._closing = True

    def abandon(self):
        """Refuse all that wait and stop what is being done."""
        with self._lock:
            waiting = self._queue.places()
            for request in waiting:
                self._queue.remove(request)
            for request in [*waiting, *self._running]:
                request.job._stop.set()
                _settle(request, StudioError(CLOSED))

    def _serve(self):
        with self._lock:
            self._running = [each for each in self._queue.take() if each.future.set_running_or_notify_cancel()]
            self._tell()
        results = _results(self._running, self.device) if self._running else []
        with self._lock:
            for request, result in zip(self._running, results):
                _settle(request, result)
            self._running = []

    def _tell(self):
        """Tell who waits how many turns come before, the one that is under way included."""
        for ahead, request in enumerate(self._queue.places(), bool(self._running)):
            if request.share and ahead:
                request.job.report(request.share.waiting(ahead))


def _settle(request, result):
    """Give a request its result or its error, unless it has one or was withdrawn."""
    with suppress(InvalidStateError):
        if isinstance(result, BaseException):
            request.future.set_exception(result)
        else:
            request.future.set_result(result)


def _results(requests, device):
    """What these requests give, errors too. A call for all of them that fails is done again for each alone."""
    for request in requests:
        request.job.device = device
    if len(requests) > 1:
        first, wishes = requests[0], [request.share.wish for request in requests]
        try:
            return first.context.run(first.share.together, wishes, [request.job for request in requests])
        except BaseException as error:
            _LOG.error("A call for %d requests failed; each is done alone", len(requests), exc_info=error)
    return [_result(request) for request in requests]


def _result(request):
    try:
        return request.context.run(request.work, request.job)
    except BaseException as error:
        return error


_stations = [DeviceWorker(Device(), QueueLimits())]


def use_workers(stations):
    """Let all work from now on be done there, each by the least busy one that has room."""
    _stations[:] = stations


def is_idle():
    """Whether nothing waits or is being done."""
    return not any(station.load for station in _stations)


def drain(seconds):
    """Take no more work from now on, wait until what there is has been done, and after so many seconds refuse the rest.

    Returns:
        Whether all of it was done.
    """
    for station in _stations:
        station.close()
    ends = time.monotonic() + seconds
    while not (idle := is_idle()) and time.monotonic() < ends:
        time.sleep(_SHORTEST_PAUSE)
    for station in _stations:
        station.abandon()
    return idle


def _submit(request):
    """Put a request into a queue; returns its `DeviceWorker`. Errors: `StudioError` where no station has room."""
    refusal = None
    for station in sorted(_stations, key=lambda each: each.load):
        try:
            station.submit(request)
            return station
        except StudioError as error:
            refusal = refusal or error
    raise refusal


async def follow(work, share=None):
    """Run `work(job)` in the thread of a device, with the caller's context variables, when its turn comes.

    Args:
        work: the work alone.
        share: what lets it be done together with others, a `BatchSpec`.

    Yields the items it reports, newest only, and at last what it returns.

    Raises:
        StudioError: too many wait already, the server stops, or nobody listens any more.
        Exception: whatever the work raises.
    """
    is_heard = listening()
    job = Job(asyncio.get_running_loop())
    request = _Request(work, job, session(), share)
    station = _submit(request)
    future = asyncio.wrap_future(request.future)
    future.add_done_callback(lambda done: (done.cancelled() or done.exception(), job._news.set()))
    try:
        while not future.done():
            if (item := await job._next()) is not None and not future.done():
                yield item
                await asyncio.sleep(_SHORTEST_PAUSE)
            if not is_heard():
                raise StudioError("Nobody listened for the answer: this request was dropped.")
        yield future.result()
    finally:
        job._stop.set()
        future.cancel()
        station.withdraw(request)
