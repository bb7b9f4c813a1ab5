"""Work on a GPU that is lent by the call, as on Hugging Face's ZeroGPU Spaces.

There a function runs in a process of its own that has the GPU for some seconds; what it changes stays there, and only
what it yields comes back. Without the package `spaces` all of this stands aside.
"""

import queue
import threading
from dataclasses import dataclass
from importlib.util import find_spec

from studio.errors import StudioError
from studio.ui.server.models import HERE, get_pipeline


def on_gpu(seconds):
    """Decorate a function `work(wish, job)` that is followed, so that a lent GPU does it where GPUs are lent.

    Args:
        seconds: how long it may take there.
    """
    return lambda work: _lent(work, seconds) if is_lent() else work


def is_lent():
    """Whether this process is one of a Space that may lend GPUs."""
    return find_spec("spaces") is not None


def place(model):
    """Load a model before the first session comes, where GPUs are lent: a lent one sees what was there at the start."""
    if is_lent():
        get_pipeline(model)


def _lent(work, seconds):
    import spaces

    @spaces.GPU(duration=seconds)
    def items(wish):
        yield from _items(work, wish)

    def lent(wish, job):
        steps = items(wish)
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
    """The job of a work whose reports are taken one by one; see `studio.ui.server.worker.Job`."""

    def __init__(self):
        self.items = queue.SimpleQueue()
        self.stopped, self.device = False, HERE

    def report(self, item):
        self.items.put(item)


def _items(work, wish):
    """What `work(wish, job)` reports, and at last a `_Result` or a `_Mistake`; closing it stops it at its next step."""
    job, over = _Reports(), object()
    outcome = []

    def run():
        try:
            outcome.append(_Result(work(wish, job)))
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
