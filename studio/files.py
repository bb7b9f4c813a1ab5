"""Paths: the cache folder of files that Studio can make again, paths given by the user, and folders made whole."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

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
        if not locked(file):
            raise StudioError(f"Another run writes to {out}: wait for it, stop it, or give another --out.")
        yield


def locked(file: IO) -> bool:
    """Lock a file until it is closed; whether no other process has locked it. Windows has no such locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that is renamed to `out` at the end, or removed on an error.

    Raises:
        StudioError: `out` exists and is not empty, is the current folder, or cannot be written.
    """
    given, out = user_path(out), Path(os.path.realpath(user_path(out)))
    if out.exists() and not out.is_dir():
        raise StudioError(f"{given} exists already and is a file: choose another folder.")
    temporary = None
    try:
        if out.is_dir() and any(out.iterdir()):
            raise StudioError(f"{given} exists already and is not empty: choose another folder.")
        if out.is_dir() and out.samefile("."):
            raise StudioError(f"{given} is the current folder, which cannot be replaced: name a new folder in it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        temporary.chmod(0o755)
        yield temporary
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        raise StudioError(f"{given} cannot be written ({error.strerror or error}): choose another folder.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
