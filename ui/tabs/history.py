"""The strip of what a session has made, below the images of the Generate tab."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.history import add, archive, chosen_file
from studio.ui.server.png_metadata import Form, from_image
from studio.ui.server.send_to import SendTo, build_send_to
from studio.ui.tabs.actions import PRIVATE
from studio.ui.tabs.components import image_grid

_SEND_TO = {"edit": "Edit", "tokenize": "Tokenize", "ask": "Ask"}
_SAVE = "() => setTimeout(() => document.getElementById('history-archive')?.click(), 100)"


@dataclasses.dataclass(frozen=True)
class History:
    """The strip.

    Args:
        past: state: the paths of the session's files, the newest first.
        strip: shows them.
        send_to: the buttons that send one to another tab.
        use: the button that fills the form with the settings of one.
        file: the button that downloads one.
    """

    past: gr.State
    strip: gr.Gallery
    send_to: SendTo
    use: gr.Button
    file: gr.DownloadButton

    def recorded(self, work: Callable[..., AsyncIterator[Any]], gallery: int = 0) -> Callable[..., AsyncIterator[Any]]:
        """Work whose finished images are put into the strip.

        Args:
            work: yields updates of its outputs.
            gallery: the index of the gallery among them; its images are files where they are finished.

        Returns:
            Work with `past` as one more input, the first, and with `outputs` as more outputs, the last.
        """

        async def recording(past: list[str], *values: Any) -> AsyncIterator[Any]:
            async for update in work(*values):
                yield *update, *self._shown(past, finished_files(update[gallery]))

        return recording

    @property
    def outputs(self) -> list[gr.Component]:
        """What changes with each new image."""
        return [self.strip, self.file]

    def _shown(self, past: list[str], files: Sequence[str]) -> tuple[Any, Any]:
        if not files:
            return gr.skip(), gr.skip()
        found = add(past, files)
        return gr.update(value=found, selected_index=None), gr.update(value=found[0][0] if found else None)


def build_history(renewals: Sequence[Any]) -> History:
    """Lay out the strip; the style sheet hides it while it is empty.

    Args:
        renewals: events after which no image is chosen.
    """
    past = gr.State([])
    with gr.Column(elem_classes="studio-history"):
        gr.Markdown("What you have made, newest first.", elem_classes="studio-hint")
        strip = image_grid(label="History", columns=24, allow_preview=False, elem_id="history", show_label=False)
        with gr.Row(elem_classes="studio-history-actions"):
            use = gr.Button("Use these settings", elem_id="history-use", size="sm")
            send_to = build_send_to(strip, _SEND_TO, renewals, prefix="history-")
            file = gr.DownloadButton("Download", elem_id="history-file", size="sm")
            everything = gr.Button("Download all", elem_id="history-all", size="sm")
            whole = gr.DownloadButton("All images", elem_id="history-archive", elem_classes="studio-hidden")
    strip.select(_file, past, file, queue=False, **PRIVATE)
    saved = everything.click(archive, past, whole, **PRIVATE)
    saved.success(None, None, None, js=_SAVE, queue=False, **PRIVATE)
    return History(past, strip, send_to, use, file)


def connect_history(history: History, form: Form) -> None:
    """Let the button fill the form with the settings of the image that was clicked, or of the newest."""
    history.use.click(
        lambda past, chosen, name: use_settings(form, past, chosen, name),
        [history.past, history.send_to.chosen, form.models],
        form.outputs,
        **PRIVATE,
    )


def use_settings(form: Form, past: list[str], chosen: Any, model: Any) -> dict[gr.Component, Any]:
    """Updates of the form from a file of a session; an error becomes a toast, and the form stays as it is."""
    try:
        return form.filled(from_image(chosen_file(past, chosen)), model)
    except Exception as error:
        toast(sentence_of(error))
        return {}


def finished_files(update: Any) -> list[str]:
    """The files of an update of a gallery; empty where one of its images is a preview."""
    found = update.get("value") if isinstance(update, dict) else None
    files = [image for image, _ in found or ()]
    return files if all(isinstance(file, str) for file in files) else []


def _file(past: list[str], event: gr.SelectData) -> Any:
    return past[event.index] if event.index < len(past) else gr.skip()
