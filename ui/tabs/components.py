"""Components that tabs share: the header, the status line, the image grid."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL.Image import Image

from studio.checks import check_text
from studio.errors import StudioError
from studio.saving import slug
from studio.ui.server.session import in_request

_MARK_CLASSES = ["", "", "", "", "next", "open", "open", "open", "open"]
_LONGEST_PATH = 4000  # characters


def _mark() -> str:
    """The logo: a grid of tokens, the middle one being sampled."""
    squares = "".join(
        f'<rect x="{1 + 7.8 * (index % 3):g}" y="{1 + 7.8 * (index // 3):g}" width="6.4" height="6.4" rx="1.6" '
        f'class="{name}"/>'
        for index, name in enumerate(_MARK_CLASSES)
    )
    return f'<svg viewBox="0 0 24 24" width="26" height="26" aria-hidden="true" class="studio-mark">{squares}</svg>'


def header() -> gr.HTML:
    """The header of the page: name and tagline."""
    return gr.HTML(
        f'<div class="studio-header">{_mark()}<h1>Studio</h1><p>Images from text, one token at a time</p></div>',
        elem_id="studio-header",
    )


def image_grid(captioned: bool = False, **settings: Any) -> gr.Gallery:
    """A gallery of PNG images, with captions below them if `captioned`, else over them on demand.

    Args:
        captioned: where captions are shown.
        settings: passed on to `gr.Gallery`.
    """
    return gr.Gallery(
        format="png",
        object_fit="contain",
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes=["studio-images", "studio-captioned"] if captioned else "studio-images",
        **settings,
    )


def named_png(image: Image, *parts: str | int) -> str:
    """The path of a PNG that the app serves, with a name as `studio generate` gives, under which it is downloaded.

    Args:
        image: finished; its metadata is kept.
        parts: of the name: what tells the image from others, such as prompt and seed.
    """
    return save_pil_to_cache(image, get_upload_folder(), "-".join(slug(str(part)) for part in parts), "png")


def count_slider(most: int, **settings: Any) -> gr.Slider:
    """A slider from 1 to `most` images, hidden where `most` is 1."""
    return gr.Slider(1, max(most, 2), step=1, buttons=[], visible=most > 1, **settings)


def columns_for(count: int) -> int:
    """The columns of a square grid for `count` images."""
    return math.ceil(math.sqrt(count))


def status_line(
    text: str,
    *,
    state: str = "idle",
    fraction: float | None = None,
    details: Sequence[tuple[str, str]] = (),
    link: tuple[str, str] | None = None,
) -> str:
    """The line below the images.

    Args:
        text: one sentence.
        state: "idle", "running", "done" or "stopped".
        fraction: of the work that is done, 0 to 1, for a progress bar; `None` for no bar.
        details: pairs (label, value).
        link: the text and the address of a link at the end.

    Returns:
        HTML.
    """
    bar = "" if fraction is None else progress_bar(fraction, "Progress")
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in details)
    leading = "" if link is None else f'<a href="{escape(link[1])}">{escape(link[0])}</a>'
    live = "off" if state == "running" else "polite"
    return (
        f'<div class="studio-status {state}" role="status" aria-live="{live}">{bar}<p>{escape(text)}</p>'
        f"{f'<dl>{facts}</dl>' if facts else ''}{leading}</div>"
    )


def progress_bar(fraction: float, label: str) -> str:
    """HTML of a progress bar that is filled by a fraction of 0 to 1."""
    percent = round(100 * min(max(fraction, 0.0), 1.0))
    return (
        f'<div class="studio-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}" aria-label="{escape(label)}"><i style="width:{percent}%"></i></div>'
    )


def duration(seconds: float) -> str:
    """Seconds as text, such as "12 ms", "1.3 s" or "2 min"."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.{2 if seconds < 0.995 else 1}f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def images(count: int) -> str:
    """The count with its noun, such as "4 images"."""
    return f"{count} image{'s' * (count != 1)}"


def short_name(model: str) -> str:
    """The last part of a model's name or folder."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def uploaded(file: Any) -> str:
    """The path of an uploaded file; empty where none was given.

    Raises:
        StudioError: no file, or one that was not uploaded. Gradio itself does not check all paths.
    """
    if file is None:
        return ""
    path = file.get("path") if isinstance(file, dict) else None
    if not path:
        raise StudioError("This is no file: upload one, and give what the upload answers.")
    check_text("The path of a file", path, _LONGEST_PATH)
    if "\0" in path or (in_request() and not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())):
        raise StudioError("This file was not uploaded: drop it on the field, or upload it first.")
    return path
