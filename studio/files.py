"""Where Studio keeps what it can make again."""

import os
from pathlib import Path


def cache_folder():
    """`STUDIO_CACHE`, else `studio` in the user's cache folder; it need not exist yet."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "studio"
    return Path(os.environ.get("STUDIO_CACHE") or fallback)
