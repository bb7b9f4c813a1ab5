"""Pieces that every tab shares: the header, the status line, the image grid."""

import math
from html import escape
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from studio.errors import StudioError
from studio.ui.server.checks import check_text
from studio.ui.server.session import in_request

_MARK_CLASSES = ["", "", "", "", "next", "open", "open", "open", "open"]
_LONGEST_PATH = 4000  # characters


def _mark():
    """The logo: a grid of tokens, the middle one being sampled."""
    squares = "".join(
        f'<rect x="{1 + 7.8 * (index % 3):g}" y="{1 + 7.8 * (index // 3):g}" width="6.4" height="6.4" rx="1.6" '
        f'class="{name}"/>'
        for index, name in enumerate(_MARK_CLASSES)
    )
    return f'<svg viewBox="0 0 24 24" width="26" height="26" aria-hidden="true" class="studio-mark">{squares}</svg>'


def header(model):
    """The head of the page: name, what it does, which model it uses."""
    return gr.HTML(
        f'<div class="studio-header">{_mark()}<h1>Studio</h1>'
        "<p>Images from words, one token at a time</p>"
        f'<span class="studio-model">{escape(short_name(model))}</span></div>',
        elem_id="studio-header",
    )


def image_grid(captioned=False, **settings):
    """A gallery of PNG images (never re-encoded with losses), with captions below them or over them on demand."""
    return gr.Gallery(
        format="png",
        object_fit="contain",
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes=["studio-images", "studio-captioned"] if captioned else "studio-images",
        **settings,
    )


def count_slider(most, **settings):
    """A slider from 1 to `most` images, which is hidden where there is no choice."""
    return gr.Slider(1, max(most, 2), step=1, buttons=[], visible=most > 1, **settings)


def columns_for(count):
    """Columns of the grid for `count` images."""
    return math.ceil(math.sqrt(count))


def status_line(text, *, state="idle", fraction=None, details=(), link=None):
    """The line below the images.

    Args:
        text: one sentence.
        state: "idle", "running", "done" or "stopped".
        fraction: how much is done, 0-1, for a progress bar.
        details: pairs (label, value).
        link: what a link behind them says, and where it leads.
    """
    bar = "" if fraction is None else progress_bar(fraction, "Progress")
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in details)
    leading = "" if link is None else f'<a href="{escape(link[1])}">{escape(link[0])}</a>'
    live = "off" if state == "running" else "polite"
    return (
        f'<div class="studio-status {state}" role="status" aria-live="{live}">{bar}<p>{escape(text)}</p>'
        f"{f'<dl>{facts}</dl>' if facts else ''}{leading}</div>"
    )


def progress_bar(fraction, label):
    """A bar of which 0-1 is filled."""
    percent = round(100 * min(max(fraction, 0.0), 1.0))
    return (
        f'<div class="studio-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}" aria-label="{escape(label)}"><i style="width:{percent}%"></i></div>'
    )


def duration(seconds):
    """Seconds as a person reads them."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.{2 if seconds < 0.995 else 1}f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def images(count):
    """`count` with its noun."""
    return f"{count} image{'s' * (count != 1)}"


def short_name(model):
    """The last part of a model's name or folder."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def uploaded(file):
    """Where Gradio put an uploaded file, whatever it holds; `None` where none was given.

    Raises:
        StudioError: it is no file, or a request names one that was not uploaded. Gradio itself does not look at all of
            them.
    """
    if file is None:
        return None
    path = file.get("path") if isinstance(file, dict) else None
    if not path:
        raise StudioError("This is no file: upload one, and give what the upload answers.")
    check_text("The path of a file", path, _LONGEST_PATH)
    if "\0" in path or (in_request() and not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())):
        raise StudioError("This file was not uploaded: drop it on the field, or upload it first.")
    return path
