"""Work on a GPU that is lent for one call, as on Hugging Face's ZeroGPU Spaces.

There a decorated function runs in a process of its own that has the GPU for some seconds. What it changes stays there;
only what it yields comes back. Without the package `spaces`, functions run as they are.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from studio.errors import StudioError
from studio.ui.server.models import DEFAULT_DEVICE, get_pipeline

Work = Callable[[Any, Any], Any]
"""`work(request, job)`, with a `studio.ui.server.worker.Job` or what stands for it on a lent GPU."""


def on_gpu(seconds: int) -> Callable[[Work], Work]:
    """Decorate `work(request, job)` to run on a lent GPU where GPUs are lent.

    Args:
        seconds: how long the work may take there.

    Returns:
        The decorator. The request, and what the work reports and returns, must be picklable.
    """
    return lambda work: _lent(work, seconds) if is_lent() else work


def is_lent() -> bool:
    """Whether this process is one of a Space that may lend GPUs."""
    return find_spec("spaces") is not None


def preload(model: str) -> None:
    """Load a model before the first session where GPUs are lent: they see what was loaded at the start."""
    if is_lent():
        get_pipeline(model)


def _lent(work: Work, seconds: int) -> Work:
    import spaces  # type: ignore[import-not-found]  # there on Spaces only

    @spaces.GPU(duration=seconds)
    def items(request: Any) -> Iterator[Any]:
        yield from _items(work, request)

    def lent(request: Any, job: Any) -> Any:
        steps = items(request)
        try:
            for item in steps:
                if isinstance(item, _Mistake):
                    raise StudioError(item.sentence)
                if isinstance(item, _Result) or job.stopped:
                    return getattr(item, "value", None)
                job.report(item)
        finally:
            steps.close()

    return lent


@dataclass(frozen=True)
class _Mistake:
    """A `StudioError` on its way between processes."""

    sentence: str


@dataclass(frozen=True)
class _Result:
    """What the work returned, after all that it reported."""

    value: object


class _Reports:
    """The job of work whose reports are taken one by one; see `studio.ui.server.worker.Job`."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopped, self.device = False, DEFAULT_DEVICE

    def report(self, item: Any) -> None:
        self.items.put(item)


def _items(work: Work, request: Any) -> Iterator[Any]:
    """What `work(request, job)` reports, then a `_Result` or a `_Mistake`; closing this stops it at its next step."""
    job, over = _Reports(), object()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(_Result(work(request, job)))
        except StudioError as error:
            outcome.append(_Mistake(str(error)))
        except BaseException as error:
            outcome.append(error)
        job.items.put(over)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := job.items.get()) is not over:
            yield item
    finally:
        job.stopped = True
        thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    yield outcome[0]
