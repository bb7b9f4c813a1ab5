"""Paths: the cache folder of files that Studio can make again, and paths given by the user."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from studio.errors import StudioError

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """`STUDIO_CACHE`, else `studio` in the user's cache folder; it need not exist yet.

    A user without a home, as in some containers, has a temporary folder for as long as the process runs.
    """
    if chosen := os.environ.get("STUDIO_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "studio"
    try:
        return Path.home() / ".cache" / "studio"
    except RuntimeError:
        return Path(_temporary_folder().name)


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="studio-", ignore_cleanup_errors=True)


def user_path(path: str | Path) -> Path:
    """A path given by the user, with a leading `~` expanded where that user is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def only_one_run(out: Path) -> Iterator[None]:
    """Within the block no other process of this machine and cache folder enters one for the same folder.

    The lock is kept in the cache folder, so `out` need not exist; where that cannot be written there is none.

    Raises:
        StudioError: another process is in such a block.
    """
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:32]
    try:
        (cache_folder() / "locks").mkdir(parents=True, exist_ok=True)
        file = open(cache_folder() / "locks" / name, "a")
    except OSError:
        yield
        return
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudioError(f"Another run writes to {out}: wait for it, stop it, or give another --out.") from error
        yield
