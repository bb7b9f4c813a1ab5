"""The files of visitors: in a folder of this process that nobody else reads, not for long, and not without a bound.

Imports nothing of Gradio, which looks at its environment when it is imported.
"""

import asyncio
import atexit
import os
import shutil
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

_ROUND = 30  # seconds between two looks at what there is
_OLDEST = 3600  # seconds that a file stays
_MOST_BYTES = 1 << 30  # of all files
_MOST_FILES = 20_000
_IDLE = 600  # seconds after which Gradio forgets a session that nobody listens to


def use_private_folder():
    """Let Gradio keep files in a new folder that is removed at the end; all that this process writes is its owner's."""
    os.umask(0o077)
    folder = tempfile.mkdtemp(prefix="studio-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
    return Path(folder)


def sweep(folder, keep=frozenset(), now=None):
    """Delete files that are old, then the oldest until the others are few and small enough, and folders left empty.

    Args:
        folder: a `Path`.
        keep: the paths of files that stay.
        now: seconds since the epoch; the clock's when `None`.
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


def forget_sessions(blocks, listeners):
    """Let go of what Gradio keeps of sessions that are idle and heard by nobody, and of files that are gone."""
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
async def kept_clean(folder, blocks, listeners):
    """While this is entered, both are done every half a minute."""

    async def rounds():
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
