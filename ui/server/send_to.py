"""A sampled image on its way to another tab."""

import dataclasses

import gradio as gr

from studio.ui.server.failures import toast
from studio.ui.tabs.actions import PRIVATE


@dataclasses.dataclass(frozen=True)
class SendTo:
    """Where images leave a tab.

    Args:
        gallery: the images.
        chosen: state, the number of the one that was clicked, or `None`.
        buttons: by the id of the tab that they lead to.
    """

    gallery: gr.Gallery
    chosen: gr.State
    buttons: dict[str, gr.Button]


def build_send_to(gallery, titles, renewals):
    """Lay out the buttons below a gallery; the style sheet hides them while there is no image.

    Args:
        gallery: the images.
        titles: what each button says, by the id of the tab that it leads to.
        renewals: events after which none of the images is chosen.
    """
    chosen = gr.State()
    with gr.Row(elem_classes="studio-outlet"):
        buttons = {tab: gr.Button(title, elem_id=f"to-{tab}", size="sm") for tab, title in titles.items()}
    gallery.select(_number, None, chosen, queue=False, **PRIVATE)
    gr.on([gallery.preview_close, *renewals], lambda: None, None, chosen, queue=False, **PRIVATE)
    return SendTo(gallery, chosen, buttons)


def connect_send_to(outlet, tabs, fields):
    """Let the buttons of an outlet put an image into a field of another tab, and go there.

    Args:
        tabs: the `gr.Tabs` that hold them.
        fields: the image fields, by the id of their tab.
    """
    for tab, button in outlet.buttons.items():
        button.click(
            _pass_to(tab), [outlet.gallery, outlet.chosen], [fields[tab], tabs], **PRIVATE
        )  # toasts need a queue


def _number(event: gr.SelectData):
    return event.index


def _pass_to(tab):
    def passed(images, chosen):
        if not images:
            toast("There is no image yet: sample one first.")
            return gr.skip(), gr.skip()
        if chosen is None and len(images) > 1:
            gr.Info("This is the first image: click on another one to choose it.", duration=6)
        path, _ = images[min(chosen or 0, len(images) - 1)]
        return path, gr.update(selected=tab)

    return passed
