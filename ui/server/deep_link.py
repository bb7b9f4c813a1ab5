"""Links into the app: `/?prompt=a+fox&decoding=lantern&delta=0.1` fills the form, `tab=ask` opens another tab."""

import gradio as gr

from studio.errors import StudioError
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import check_words
from studio.ui.server.png_metadata import KNOWN, from_link
from studio.ui.tabs.actions import PRIVATE

TABS = ("generate", "tokenize", "ask", "compare")


def connect_link(demo, tabs, form, question, prompt):
    """Let a page that is opened by a link hold what the link says; nothing is sampled before somebody asks for it.

    Args:
        demo: the `gr.Blocks`.
        tabs: the `gr.Tabs` of `TABS`.
        form: the `Form` of the tab "generate".
        question: the field of the tab "ask" that `question` fills.
        prompt: the field of the tab "compare" that `prompt` fills if the link opens that tab.
    """
    outputs = [tabs, question, prompt, *form.fields]

    def follow(request: gr.Request):
        try:
            return followed(dict(request.query_params), form)
        except Exception as error:
            toast(sentence_of(error), title="The link is wrong")
            return [gr.skip()] * len(outputs)

    demo.load(follow, None, outputs, **PRIVATE)


def followed(parameters, form):
    """Updates of tabs, question, the prompt to compare with, and the form.

    Raises:
        StudioError: the link names a tab that is none, or something wrong for a field.
    """
    own = {name: text for name, text in parameters.items() if not name.startswith("__")}  # Gradio's begin so
    tab, question = own.pop("tab", None), own.pop("question", None)
    if tab not in (None, *TABS):
        raise StudioError(f"There is no tab {tab[:40]!r}: the tabs are {', '.join(TABS)}.")
    compared = own.pop("prompt", None) if tab == "compare" else None
    for what, text in (("The question", question), ("The prompt", compared)):
        if text is not None:
            check_words(what, text)
    fields = form.filled(from_link(own)) if own.keys() & KNOWN else [gr.skip()] * len(form.fields)
    shown = gr.skip() if tab is None else gr.update(selected=tab)
    return [shown, *(gr.skip() if text is None else text for text in (question, compared)), *fields]
