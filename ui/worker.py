"""Long work beside the app: one thread that owns the models, followed from the event loop, stoppable at any step.

Handlers are asynchronous generators over `follow`. Cancelling one, closing it, or losing its visitor ends the
`await` at once and sets the job's stop flag, which the work sees at its next step.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

_model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio-model")
_SHORTEST_PAUSE = 0.04  # seconds between two items, so that fast models do not flood the browser


class Job:
    """What the work sees of the one who waits for it."""

    def __init__(self, loop):
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
        await self._news.wait()
        self._news.clear()
        item, self._latest = self._latest, None
        return item


async def follow(work):
    """Run `work(job)` in the model thread, with the caller's context variables.

    Yields the items it reports, newest only, and at last what it returns.

    Raises:
        Exception: whatever the work raises.
    """
    job = Job(asyncio.get_running_loop())
    future = asyncio.wrap_future(_model_thread.submit(copy_context().run, work, job))
    future.add_done_callback(lambda done: (done.cancelled() or done.exception(), job._news.set()))
    try:
        while not future.done():
            if (item := await job._next()) is not None and not future.done():
                yield item
                await asyncio.sleep(_SHORTEST_PAUSE)
        yield future.result()
    finally:
        job._stop.set()
        future.cancel()
