"""Paths: the cache folder of files that Studio can make again, and paths given by the user."""

import os
import tempfile
from functools import cache
from pathlib import Path


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
