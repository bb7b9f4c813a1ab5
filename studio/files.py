"""Where files lie: what Studio can make again, and what a person names."""

import os
from pathlib import Path


def cache_folder():
    """`STUDIO_CACHE`, else `studio` in the user's cache folder; it need not exist yet."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "studio"
    return Path(os.environ.get("STUDIO_CACHE") or fallback)


def user_path(path) -> Path:
    """A path that a person gave, with a leading `~` replaced where that user is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
