"""A drawn picture on its way to another tab."""

import dataclasses

import gradio as gr

from studio.ui.server.failures import toast
from studio.ui.tabs.actions import PRIVATE


@dataclasses.dataclass(frozen=True)
class Outlet:
    """Where pictures leave a tab.

    Args:
        gallery: the pictures.
        chosen: state, the number of the one that was clicked, or `None`.
        buttons: by the id of the tab that they lead to.
    """

    gallery: gr.Gallery
    chosen: gr.State
    buttons: dict[str, gr.Button]


def build_outlet(gallery, titles, renewals):
    """Lay out the buttons below a gallery; the style sheet hides them while there is no picture.

    Args:
        gallery: the pictures.
        titles: what each button says, by the id of the tab that it leads to.
        renewals: events after which none of the pictures is chosen.
    """
    chosen = gr.State()
    with gr.Row(elem_classes="studio-outlet"):
        buttons = {tab: gr.Button(title, elem_id=f"to-{tab}", size="sm") for tab, title in titles.items()}
    gallery.select(_number, None, chosen, queue=False, **PRIVATE)
    gr.on([gallery.preview_close, *renewals], lambda: None, None, chosen, queue=False, **PRIVATE)
    return Outlet(gallery, chosen, buttons)


def connect_outlet(outlet, tabs, fields):
    """Let the buttons of an outlet put a picture into a field of another tab, and go there.

    Args:
        tabs: the `gr.Tabs` that hold them.
        fields: the picture fields, by the id of their tab.
    """
    for tab, button in outlet.buttons.items():
        button.click(
            _pass_to(tab), [outlet.gallery, outlet.chosen], [fields[tab], tabs], **PRIVATE
        )  # toasts need a queue


def _number(event: gr.SelectData):
    return event.index


def _pass_to(tab):
    def passed(pictures, chosen):
        if not pictures:
            toast("There is no picture yet: draw one first.")
            return gr.skip(), gr.skip()
        if chosen is None and len(pictures) > 1:
            gr.Info("This is the first picture: click on another one to choose it.", duration=6)
        path, _ = pictures[min(chosen or 0, len(pictures) - 1)]
        return path, gr.update(selected=tab)

    return passed
