"""The files of sessions: in a private folder of this process, for a limited time and within a limited size.

This module imports nothing of Gradio, which reads its environment when it is imported.
"""

import asyncio
import atexit
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradio import Blocks

    from studio.ui.server.session import Listeners

_ROUND = 30  # seconds between two sweeps
_OLDEST = 3600  # seconds that a file stays
_MOST_BYTES = 1 << 30  # of all files
_MOST_FILES = 20_000
_IDLE = 600  # seconds after which Gradio forgets a session that nobody listens to


def use_private_folder() -> Path:
    """Let Gradio keep files in a new folder that is removed at exit; only their owner can read this process's files."""
    os.umask(0o077)
    folder = tempfile.mkdtemp(prefix="studio-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
    return Path(folder)


def sweep(folder: Path, keep: Collection[str] = frozenset(), now: float | None = None) -> None:
    """Delete old files, then the oldest until the rest is few and small enough, and empty folders.

    Args:
        folder: what to sweep.
        keep: the paths of files that stay.
        now: seconds since the epoch; `None` for the clock's.
    """
    now = time.time() if now is None else now
    files = []
    for path in reversed(list(folder.rglob("*"))):
        with suppress(OSError):
            state = path.lstat()
            if path.is_dir() and not path.is_symlink():
                if now - state.st_mtime > _ROUND:
                    path.rmdir()  # only where it is empty
            elif str(path) not in keep:
                files.append((max(state.st_mtime, state.st_ctime), state.st_size, path))
    files.sort(reverse=True)
    total = 0
    for number, (changed, size, path) in enumerate(files):
        total += size
        if now - changed > _OLDEST or total > _MOST_BYTES or number >= _MOST_FILES:
            with suppress(OSError):
                path.unlink()


def forget_sessions(blocks: "Blocks", listeners: "Listeners") -> None:
    """Drop what Gradio keeps of idle sessions without listeners, and of files that are gone."""
    queue, states = blocks._queue, blocks.state_holder
    busy = {event.session_hash for event in queue.event_ids_to_events.values()}
    idle = time.time() - _IDLE
    for session, used in list(states.time_last_used.items()):
        if used.timestamp() < idle and session not in busy and not listeners.awaits(session):
            states.session_data.pop(session, None)
            states.time_last_used.pop(session, None)
    for session in list(queue.pending_event_ids_session):
        if session not in busy and session not in states.session_data and not listeners.awaits(session):
            queue.pending_event_ids_session.pop(session, None)
            queue.pending_messages_per_session.pop(session, None)
    for names in (blocks.upload_file_set, *blocks.temp_file_sets):
        names.intersection_update([name for name in list(names) if os.path.lexists(name)])


@asynccontextmanager
async def kept_clean(folder: Path, blocks: "Blocks", listeners: "Listeners") -> AsyncIterator[None]:
    """While this is entered, `sweep` and `forget_sessions` run every half a minute."""

    async def rounds() -> None:
        while True:
            await asyncio.sleep(_ROUND)
            forget_sessions(blocks, listeners)
            keep = {name for block in blocks.blocks.values() for name in getattr(block, "keep_in_cache", ())}
            await asyncio.to_thread(sweep, folder, keep)

    task = asyncio.create_task(rounds())
    try:
        yield
    finally:
        task.cancel()
