"""The Ask tab: a question about an image, answered from few of its tokens and from all of them."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from studio import merging_methods
from studio.ui.jobs.ask_job import QUECC, AskRequest, Reading, ask_methods, merge_of, place_of, read
from studio.ui.render.render_answers import render_answers, verdict
from studio.ui.render.render_patches import render_patches
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.models import bundled_models
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import image_grid, status_line, uploaded
from studio.ui.tabs.examples import example

EXAMPLES = [
    ("scene-ewes.png", "How many times is there a sled?"),
    ("scene-melon.png", "What is in row 2, column 3?"),
    ("scene-words.png", "Which word is in row 3, column 2?"),
]
IDLE = status_line("Give an image and a question, and see which patches the answer comes from.")
NO_READER = status_line(
    "No vision-language model comes with this copy: name one of Hugging Face or a folder under Model, or train "
    "your own: studio train --preset emoji-vlm."
)
LOADING = status_line("Loading the model …", state="running", fraction=0)
_NUMBERS = "36,28,20"
_MERGE_INFO = (
    "Tokens that resemble one another become one while the image is read. For LLaVA with a CLIP or SigLIP tower."
)
_VIEWS = {"whole": "Whole image", "crops": "Crops"}


def build_tab() -> tuple[gr.Image, gr.Textbox]:
    """Build the tab inside the current Blocks; the model is loaded by the first question.

    Returns:
        The fields of the image and of the question.
    """
    readers = bundled_models("reader")
    methods, mergers = ask_methods(), merging_methods()
    with gr.Row(elem_id="studio-ask", elem_classes="studio-stage"):
        with gr.Column(elem_classes="area-ask"):
            image = gr.Image(label="Image", sources=["upload", "clipboard"], height=240, elem_id="image")
            question = gr.Textbox(
                label="Question",
                placeholder=EXAMPLES[0][1],
                lines=1,
                max_lines=4,
                elem_id="question",
            )
            with gr.Row(elem_classes="studio-actions"):
                ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=2)
                cancel = gr.Button("Cancel", variant="stop", elem_id="ask-cancel", visible=False, scale=2)
            examples = gr.Dataset(
                components=[image, question],
                samples=[[example(file), text] for file, text in EXAMPLES],
                headers=["Image", "Question"],
                label="Try",
                elem_id="ask-examples",
                type="index",
            )
        with gr.Column(elem_classes="area-show"):
            gallery = image_grid(label="What it reads", show_label=False, columns=2, elem_id="patches", captioned=True)
            status = gr.HTML(IDLE if readers else NO_READER, elem_id="ask-status", elem_classes="studio-line")
            cards = gr.HTML("", elem_id="answers", elem_classes="studio-line")
        with gr.Column(elem_classes="area-tune"):
            method = gr.Dropdown(
                [(f"{name} ({place_of(name)})", name) for name in methods],
                value="divprune",
                label="Pruning",
                info=methods["divprune"],
                elem_id="method",
            )
            keep = gr.Slider(
                0.01,
                1,
                value=0.2,
                step=0.01,
                label="Keep",
                info="The fraction of visual tokens that stay. Methods of the KV cache read the image once for all "
                "questions.",
                elem_id="keep",
                buttons=[],
            )
            tokens = gr.Number(
                16,
                precision=0,
                minimum=1,
                label="Tokens",
                info="What the image becomes. The compressor of emoji-vlm makes 1, 4 or 16.",
                elem_id="ask-tokens",
                visible=False,
            )
            merge = gr.Dropdown(
                [("none", ""), *((name, name) for name in mergers)],
                value="",
                label="Merge in the tower",
                info=_MERGE_INFO,
                elem_id="merge",
            )
            numbers = gr.Textbox(
                label="Tokens that go",
                info="Of the image or each crop, in the tower's first layer, the second, ...",
                elem_id="merge-numbers",
                visible=False,
            )
            compare = gr.Checkbox(
                True, label="Ask with all tokens too", info="The same question, for comparison.", elem_id="compare"
            )
            model = gr.Dropdown(
                readers,
                value=readers[0] if readers else None,
                label="Model",
                info="A bundled model, a Hugging Face id or a folder.",
                allow_custom_value=True,
                elem_id="reader",
            )

    inputs = [model, image, question, method, keep, compare, tokens, merge, numbers]
    connect_actions(
        [([ask.click, question.submit], show_reading, inputs, [gallery, cards, status])],
        status,
        starts=[ask],
        cancel=cancel,
    )
    examples.click(_example, examples, [image, question], queue=False, **PRIVATE)
    method.change(
        lambda chosen: (
            gr.update(info=methods[chosen]), gr.update(visible=chosen != QUECC), gr.update(visible=chosen == QUECC)
        ),
        method,
        [method, keep, tokens],
        queue=False,
        **PRIVATE,
    )  # fmt: skip
    merge.change(_show_numbers, merge, [merge, numbers], queue=False, **PRIVATE)
    _endpoint(image, question, method, keep)
    return image, question


def _example(number: int) -> tuple[str, str]:
    file, text = EXAMPLES[number]
    return example(file), text


def _show_numbers(method: str) -> tuple[Any, Any]:
    """Updates of the method of merging and of its numbers."""
    is_learned = method == "diffrate"
    number = gr.update(
        value="" if is_learned else _NUMBERS,
        placeholder="as learned for the model; or 36+10,28+8: merged and pruned" if is_learned else _NUMBERS,
        visible=bool(method),
    )
    return gr.update(info=merging_methods().get(method, _MERGE_INFO)), number


def _endpoint(image: gr.Image, question: gr.Textbox, method: gr.Dropdown, keep: gr.Slider) -> None:
    """The endpoint for programs."""

    async def ask(image, question, model, method="divprune", keep=0.2, max_new_tokens=64, tokens=None, merge=None):
        """Answer a question about an image from some of its visual tokens; streams the answer.

        Args:
            image: an image file; a tool is given its data (data:image/png;base64,... text), no link.
            question: what to ask, up to 2,000 characters.
            model: a bundled vision-language model, a Hugging Face id or a folder.
            method: of pruning such as divprune, of the cache such as kv-coverage, or quecc; null keeps all tokens.
            keep: the fraction of visual tokens to keep, above 0 and at most 1; quecc has tokens instead.
            max_new_tokens: tokens of the answer, at most.
            tokens: as many as quecc makes of the image, 16 where none are given; for no other method.
            merge: tokens that go in the tower's first layer, the second, ...: 36,28,20, diffrate or diffrate:36+10.

        Returns:
            The answer, and details: the place where tokens are taken away, visual and kept tokens, seconds by phase,
            bytes of the cache, and with merge the patches of the image and the tokens left of them in the tower.
        """
        async for update in answer_reading(image, question, model, method, keep, max_new_tokens, tokens, merge):
            yield update

    with gr.Group(visible=False):
        model, longest = gr.Textbox(label="Model"), gr.Number(64, label="Longest answer", precision=0)
        made, merge = gr.Number(None, label="Tokens", precision=0), gr.Textbox(None, label="Merge in the tower")
        answer, details = gr.Textbox(label="Answer"), gr.JSON(label="Details")
        endpoint = gr.Button("Ask")
    inputs = [image, question, model, method, keep, longest, made, merge]
    endpoint.click(ask, inputs, [answer, details], api_name="ask", **ON_THE_MODEL)


async def show_reading(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Answer for the page: yields updates of (gallery, cards, status).

    An error becomes a toast that says what to do; images and fields stay as they are.

    Args:
        values: of the model, the image and the other fields of `AskRequest`.
    """
    shown = None
    try:
        model, image, question, method, keep, compare, tokens, merge, numbers = values
        tokens = tokens if method == QUECC else None  # hidden for the others
        how: dict[str, Any] = {"tokens": tokens, "merge": merge_of(merge, numbers)}
        request = AskRequest(model, uploaded(image), question, method, keep, compare, **how)
        async for reading in read(request):
            views, gallery = reading.pruned and reading.pruned.views, gr.skip()
            if views is not shown:
                shown, gallery = views, _gallery(reading)
            yield gallery, _cards(reading, request) if reading.image else gr.skip(), _status(reading, request)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def answer_reading(
    image: Any,
    question: Any,
    model: Any,
    method: Any,
    keep: Any,
    max_new_tokens: Any,
    tokens: Any = None,
    merge: Any = None,
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Answer for a program: yields (text, details).

    Args:
        image: what an upload answers.
        question, model, method, keep, max_new_tokens, tokens, merge: as of `AskRequest`; a blank `merge` is none.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    more = {"max_new_tokens": max_new_tokens, "tokens": tokens, "merge": merge or None}
    request = AskRequest(model, uploaded(image), question, method, keep, compare=False, **more)
    async for reading in read(request):
        if (answer := reading.pruned or reading.whole) is not None:
            yield answer.answer, {"place": place_of(method), **_details(answer)}


def _gallery(reading: Reading) -> Any:
    image, answer = reading.image, reading.pruned
    assert image is not None, "an answer has an image"
    rendered = [
        (
            render_patches(image, view),
            f"{_VIEWS[view.name]} · {int(view.kept.sum())} of {int(view.read.sum())} patches{_groups(view)}",
        )
        for view in (answer.views if answer else ())
    ]
    return gr.update(value=rendered, columns=len(rendered) or 1, selected_index=None)


def _groups(view: Any) -> str:
    """How many tokens the patches of a view were in the tower, where they were merged."""
    return "" if view.merged is None else f", {len(view.merged[view.read].unique())} tokens in the tower"


def _cards(reading: Reading, request: AskRequest) -> str:
    how = f"{request.method} ({place_of(request.method)}), {request.share}" if request.is_pruned else "All tokens"
    titles = {"whole": "All tokens", "pruned": how + _merged_by(request)}
    names = list(request.runs)
    running = next((number for number, name in enumerate(names) if name not in reading.answered), None)
    return render_answers([(titles[name], getattr(reading, name)) for name in names], running)


def _status(reading: Reading, request: AskRequest) -> str:
    if reading.image is None:
        return LOADING
    names = list(request.runs)
    if len(reading.answered) == len(names):
        text = verdict(reading.pruned, reading.whole) if reading.pruned and reading.whole else "Answered."
        return status_line(text, state="done")
    name = names[len(reading.answered)]
    chosen = getattr(reading, name) is not None
    what = "from all tokens" if name == "whole" else f"from {request.share}{_merged_by(request)}"
    text = f"{'Answering' if chosen else 'Looking at the image, to answer'} {what} …"
    return status_line(text, state="running", fraction=(len(reading.answered) + chosen / 2) / len(names))


def _details(answer: Any) -> dict[str, Any]:
    return {
        "visual_tokens": answer.visual_tokens,
        "kept_tokens": answer.kept_tokens,
        "seconds": answer.seconds,
        "cache_bytes": answer.cache_bytes,
        "tower": answer.tower and asdict(answer.tower),
    }


def _merged_by(request: AskRequest) -> str:
    """The merging of a run, behind its title."""
    return "" if request.merge is None else f", merge {request.merge}"
