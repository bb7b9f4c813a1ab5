"""Buttons that send a sampled image to another tab."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from studio.ui.server.failures import toast
from studio.ui.tabs.actions import PRIVATE

SEND_TO = {"edit": "Edit this", "tokenize": "Tokenize this", "ask": "Ask about this image"}
"""The labels of buttons, by the id of the tab that each opens."""


@dataclasses.dataclass(frozen=True)
class SendTo:
    """The buttons below a gallery.

    Args:
        gallery: the images.
        chosen: state: the number of the image that was clicked, or `None`.
        buttons: by the id of the tab that each opens.
    """

    gallery: gr.Gallery
    chosen: gr.State
    buttons: dict[str, gr.Button]


def build_send_to(gallery: gr.Gallery, titles: Mapping[str, str], renewals: Sequence[Any], prefix: str = "") -> SendTo:
    """Lay out the buttons below a gallery; the style sheet hides them while there is no image.

    Args:
        gallery: the images.
        titles: the label of each button, by the id of the tab that it opens.
        renewals: events after which no image is chosen.
        prefix: of the ids of the buttons.
    """
    chosen = gr.State()
    with gr.Row(elem_classes="studio-send-to"):
        buttons = {tab: gr.Button(title, elem_id=f"{prefix}to-{tab}", size="sm") for tab, title in titles.items()}
    gallery.select(_number, None, chosen, queue=False, **PRIVATE)
    gr.on([gallery.preview_close, *renewals], lambda: None, None, chosen, queue=False, **PRIVATE)
    return SendTo(gallery, chosen, buttons)


def connect_send_to(send_to: SendTo, tabs: gr.Tabs, fields: Mapping[str, gr.Component]) -> None:
    """Let each button put an image into the field of another tab, and open that tab.

    Args:
        send_to: the buttons.
        tabs: the tabs of the app.
        fields: the image fields, by the id of their tab.
    """
    for tab, button in send_to.buttons.items():
        button.click(
            _send(tab), [send_to.gallery, send_to.chosen], [fields[tab], tabs], **PRIVATE
        )  # toasts need a queue


def connect_pair(button: gr.Button, pair: gr.ImageSlider, tabs: gr.Tabs, editor: gr.ImageEditor) -> None:
    """Let a button put the second image of a pair into the editor, and open its tab."""

    def sent(images: Any) -> tuple[Any, Any]:
        if not images or images[1] is None:
            toast("There is no image yet: tokenize one first.")
            return gr.skip(), gr.skip()
        return images[1], gr.update(selected="edit")

    button.click(sent, pair, [editor, tabs], **PRIVATE)


def _number(event: gr.SelectData) -> int:
    return event.index


def _send(tab: str) -> Callable[[Any, int | None], tuple[Any, Any]]:
    def sent(images: Any, chosen: int | None) -> tuple[Any, Any]:
        if not images:
            toast("There is no image yet: sample one first.")
            return gr.skip(), gr.skip()
        if chosen is None and len(images) > 1:
            gr.Info("This is the first image: click on another one to choose it.", duration=6)
        path, _ = images[min(chosen or 0, len(images) - 1)]
        return path, gr.update(selected=tab)

    return sent
