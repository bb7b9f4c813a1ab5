"""Links into the app: `/?prompt=a+fox&decoding=lantern&delta=0.1` fills the form, `tab=ask` opens another tab."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from studio.checks import shown
from studio.errors import StudioError
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import check_user_text
from studio.ui.server.png_metadata import KNOWN, Form, from_link
from studio.ui.tabs.actions import PRIVATE

TABS = ("generate", "edit", "tokenize", "ask", "compare")


def connect_link(demo: gr.Blocks, tabs: gr.Tabs, form: Form, question: gr.Textbox, prompt: gr.Textbox) -> None:
    """Fill the page from the link that opens it; nothing is sampled before the user asks for it.

    Args:
        demo: the `gr.Blocks`.
        tabs: those of `TABS`.
        form: of the tab "generate".
        question: of the tab "ask", filled by the parameter `question`.
        prompt: of the tab "compare", filled by the parameter `prompt` if the link opens that tab.
    """
    outputs = [tabs, question, prompt, *form.outputs]

    def follow(request: gr.Request) -> dict[Any, Any]:
        try:
            selected, asked, compared, fields = followed(dict(request.query_params), form)
        except Exception as error:
            toast(sentence_of(error), title="The link is wrong")
            return {}
        return {tabs: selected, question: asked, prompt: compared, **fields}

    demo.load(follow, None, outputs, **PRIVATE)


def followed(parameters: Mapping[str, str], form: Form) -> tuple[Any, Any, Any, dict[gr.Component, Any]]:
    """Updates of the tabs, the question, the prompt to compare, and the fields of the form.

    Raises:
        StudioError: the link names an unknown tab, or a value that its field refuses.
    """
    own = {name: text for name, text in parameters.items() if not name.startswith("__")}  # Gradio's begin so
    tab, question = own.pop("tab", None), own.pop("question", None)
    if tab not in (None, *TABS):
        raise StudioError(f"There is no tab {shown(tab)}: the tabs are {', '.join(TABS)}.")
    compared = own.pop("prompt", None) if tab == "compare" else None
    for name, text in (("The question", question), ("The prompt", compared)):
        if text is not None:
            check_user_text(name, text)
    fields = form.filled(from_link(own)) if own.keys() & KNOWN else {}
    selected = gr.skip() if tab is None else gr.update(selected=tab)
    asked, compared = (gr.skip() if text is None else text for text in (question, compared))
    return selected, asked, compared, fields
