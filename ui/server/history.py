"""What a session has made: the newest files, and what their metadata says; each session has a list of its own."""

import zipfile
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from studio.errors import StudioError
from studio.ui.server.models import class_names
from studio.ui.server.png_metadata import SavedSettings, from_image

MOST = 24
"""Images that a session keeps."""
_GONE = "This image is gone: a server keeps files for an hour at most."
_NOTHING = "There is no image yet: sample one first."


def add(past: list[str], files: Iterable[str]) -> list[tuple[str, str]]:
    """Put files before those of a session, and leave out what is gone or too old.

    Args:
        past: the paths of its files, the newest first; it is changed.
        files: new ones, in the order in which they are shown.

    Returns:
        Its files, with what their metadata says of them.
    """
    found = []
    for path in dict.fromkeys([*files, *past]):
        with suppress(StudioError):  # it is gone
            found.append((path, _caption(from_image(path))))
    past[:] = [path for path, _ in found[:MOST]]
    return found[:MOST]


def chosen_file(past: list[str], number: Any) -> str:
    """The path of a file by its index; of the newest where the index is `None`.

    Raises:
        StudioError: there is none any more.
    """
    if not past:
        raise StudioError(_NOTHING)
    index = number if isinstance(number, int) and 0 <= number < len(past) else 0
    if not Path(past[index]).is_file():
        raise StudioError(_GONE)
    return past[index]


def archive(past: list[str]) -> str:
    """The path of a ZIP file of all files, which the app serves.

    Raises:
        StudioError: there is none.
    """
    here = [Path(path) for path in past if Path(path).is_file()]
    if not here:
        raise StudioError(_NOTHING)
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:  # stored: PNGs are compressed
        for number, path in enumerate(here, 1):
            file.write(path, f"{number:02}-{path.name}")
    return save_bytes_to_cache(content.getvalue(), "studio-images.zip", get_upload_folder())


def _caption(saved: SavedSettings) -> str:
    label = saved.basic["class_label"]
    if label is not None:
        names = class_names(saved.model or "") or {}
        what = names.get(label, f"class {label}").split(",")[0] if isinstance(label, int) else str(label)
    else:
        what = " ".join(saved.basic["prompt"].split())
    made = ", ".join(filter(None, [saved.model, saved.decoding]))
    return " · ".join(filter(None, [f"seed {saved.basic['seed']}", what, made]))
