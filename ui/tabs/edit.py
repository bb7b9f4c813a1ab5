"""The Edit tab: paint over a part of an image and redraw it, expand the image, or make variations of it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
from PIL.Image import Image

from studio.errors import StudioError
from studio.images import open_image
from studio.ui.jobs.edit_job import SIDES, Redrawing, Redrawn, RedrawRequest, box_mask, check_size, redraw
from studio.ui.jobs.edit_job import redraw_request as request_of
from studio.ui.jobs.request import number_of, sample_seed
from studio.ui.render.sizes import readable
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import limits
from studio.ui.server.models import about_model, check_choice_of_model, class_names, offered_pipelines
from studio.ui.server.send_to import SEND_TO, SendTo, build_send_to
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import (
    columns_for,
    count_slider,
    duration,
    image_grid,
    images,
    named_png,
    status_line,
    uploaded,
)
from studio.ui.tabs.fields import number_field
from studio.ui.tabs.history import History
from studio.ui.tabs.model_fields import class_field, model_field, subject_updates

DEFAULT_MODEL = "emoji-mar"
IDLE = status_line("Give an image, paint over what should change, and say what to generate there.")
_CANVAS, _BRUSH = (512, 512), 12  # pixels
_MOST_LAYERS = 8
_HINT = "What the redrawn part shows."
_PAINT = "rgba(255, 64, 96, 0.6)"


def build_tab(model: str, history: History) -> tuple[gr.ImageEditor, SendTo]:
    """Build the tab inside the current Blocks; a model is loaded by the first edit.

    Args:
        model: what is chosen where `emoji-mar` is not offered.
        history: takes the results.

    Returns:
        The editor, and the buttons that send results to other tabs, or to the editor again.
    """
    names = offered_pipelines(model)
    default = DEFAULT_MODEL if DEFAULT_MODEL in names else model
    with gr.Row(elem_id="studio-edit", elem_classes="studio-stage"):
        with gr.Column(elem_classes="area-ask"):
            editor = gr.ImageEditor(
                label="Image",
                type="pil",
                format="png",
                sources=("upload", "clipboard"),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=_BRUSH, colors=[_PAINT], color_mode="fixed"),
                canvas_size=_CANVAS,
                height=420,
                elem_id="editor",
            )
            prompt = gr.Textbox(
                label="Prompt",
                info=_HINT,
                placeholder="a green pear",
                lines=2,
                visible=class_names(default) is None,
                elem_id="edit-prompt",
            )
            class_label = class_field(default, "edit-class-label")
            with gr.Row(elem_classes="studio-actions"):
                start = gr.Button("Redraw", variant="primary", elem_id="redraw", scale=2)
                cancel = gr.Button("Cancel", variant="stop", elem_id="redraw-cancel", visible=False, scale=2)
        with gr.Column(elem_classes="area-show"):
            pair = gr.ImageSlider(
                label="Before and after",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="edit-pair",
            )
            status = gr.HTML(IDLE, elem_id="edit-status", elem_classes="studio-line")
            results = image_grid(label="Results", show_label=False, columns=4, visible=False, elem_id="edit-results")
            send_to = build_send_to(results, SEND_TO, [start.click, prompt.submit], prefix="edit-")
        with gr.Column(elem_classes="area-tune"):
            chosen = model_field(model, default, "edit-model")
            strength = gr.Slider(
                0.05, 1, value=1, step=0.05, label="Strength", buttons=[], elem_id="strength",
                info="Share of the painted cells to redraw; with no paint, of all: a variation.",
            )  # fmt: skip
            with gr.Row(elem_classes="studio-options"):
                expand = [number_field(f"Expand {side}", "Pixels.", f"expand-{side}", "0") for side in SIDES]
            padding = number_field(
                "Margin",
                "Redraw a square around the paint with this margin, for small objects.",
                "padding",
                "whole image",
            )
            most = limits().images
            count = count_slider(most, value=1, label="Images", elem_id="edit-count")
            with gr.Row(elem_classes="studio-seed"):
                seed = number_field("Seed", "The same seed redraws the same.", "edit-seed", "a new one each time")
                dice = gr.Button("Roll", elem_id="edit-dice", size="sm", scale=0, min_width=0)
            guidance = number_field(
                "Guidance", "Classifier-free guidance scale; 1 is off.", "edit-guidance", "model's own"
            )

    outputs = [pair, results, status, *history.outputs]
    inputs = [history.past, editor, chosen, prompt, class_label, count, seed, guidance, strength, padding, *expand]
    connect_actions(
        [([start.click, prompt.submit], history.recorded(show_redrawing, gallery=1), inputs, outputs)],
        status,
        starts=[start],
        cancel=cancel,
    )
    dice.click(sample_seed, None, seed, queue=False, **PRIVATE)
    chosen.input(
        lambda name: choose_model(name, chosen, prompt, class_label),
        chosen,
        [chosen, prompt, class_label],
        preprocess=False,
        **PRIVATE,
    )
    _endpoint(default)
    return editor, send_to


def choose_model(
    name: Any, chosen: gr.Dropdown, prompt: gr.Textbox, class_label: gr.Dropdown
) -> dict[gr.Component, Any]:
    """Updates of these fields after a choice of a model; an error becomes a toast, and they stay as they are."""
    try:
        model = check_choice_of_model(name)
        return {chosen: gr.update(info=about_model(model)), **subject_updates(model, prompt, class_label, _HINT)}
    except Exception as error:
        toast(sentence_of(error))
        return {}


def _endpoint(default: str) -> None:
    """The endpoint for programs."""

    async def edit(
        image, prompt, mask=None, box=None, expand=None, strength=1, count=1, seed=None, model=None, padding=None,
        class_label=None,
    ):  # fmt: skip
        """Redraw a part of an image, expand it, or make variations of it; pixels outside the mask stay as they are.

        Args:
            image: an image file; a tool is given its data (data:image/png;base64,... text), no link.
            prompt: what the redrawn part shows, such as "a green pear".
            mask: an image file that is white where to redraw, given as the image is; empty to take a box.
            box: [x, y, width, height] in pixels in place of a mask.
            expand: pixels to add by side, such as {"left": 64, "right": 64}.
            strength: share of the masked cells to redraw, above 0 to 1; with neither mask nor box a variation.
            count: how many images; a server may allow fewer than 16.
            seed: seed of the first image, the next use seed + 1 and so on; sampled when empty.
            model: a pipeline such as "emoji-mar", its name, folder or Hugging Face id.
            padding: redraw a square around the mask with this margin in pixels; empty: the shorter side of the image.
            class_label: number or name of a class, for a class-conditional model; when empty, the prompt is its name.

        Returns:
            The images as PNG files of the image's size, expanded, and details: seeds, target calls, seconds, and
            whether the model knew of what stands behind the redrawn part.
        """
        async for update in answer_redrawing(
            image, prompt, mask, box, expand, strength, count, seed, model or default, padding, class_label
        ):
            yield update

    with gr.Group(visible=False):
        image, mask = gr.Image(label="Image"), gr.Image(label="Mask")
        prompt, model = gr.Textbox(label="Prompt"), gr.Textbox(label="Model")
        box, expand = gr.JSON(label="Box"), gr.JSON(label="Expand")
        strength, count = gr.Number(1, label="Strength"), gr.Number(1, label="Count")
        seed, padding = gr.Number(label="Seed"), gr.Number(label="Padding")
        class_label = gr.Textbox(label="Class")
        found, details = image_grid(label="Images"), gr.JSON(label="Details")
        start = gr.Button("Edit")
    inputs = [image, prompt, mask, box, expand, strength, count, seed, model, padding, class_label]
    start.click(edit, inputs, [found, details], api_name="edit", **ON_THE_MODEL)


async def show_redrawing(value: Any, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Redraw for the page: yields updates of (before and after, results, status).

    An error becomes a toast that says what to do; images and fields stay as they are.

    Args:
        value: what the browser sends of the editor.
        values: those of the other fields: model, prompt, class, count, seed, guidance, strength, padding and the sides.
    """
    try:
        image, mask = painted(value)
        model, prompt, class_label, count, seed, guidance, strength, padding, *sides = values
        model = check_choice_of_model(model)
        prompt, label = (prompt, None) if class_names(model) is None else ("", class_label)
        expand = {side: number_of(f"Expand {side}", text, int) for side, text in zip(SIDES, sides)}
        numbers = number_of("The seed", seed, int), number_of("Guidance", guidance, float)
        request = request_of(
            check_size(image), mask, model, prompt, count, *numbers, strength,
            {side: pixels for side, pixels in expand.items() if pixels}, number_of("The margin", padding, int), label,
        )  # fmt: skip
        async for news in redraw(request):
            if isinstance(news, Redrawing):
                text = f"Redrawing, step {news.steps} …" if news.steps else "Loading the model …"
                yield gr.skip(), gr.skip(), status_line(text, state="running", fraction=0)
                continue
            if news.warning:
                toast(news.warning, title="Please note", duration=12)
            yield _shown(news, request)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


def _shown(news: Redrawn, request: RedrawRequest) -> tuple[Any, Any, Any]:
    files = _files(news, request)
    captioned = [(file, f"seed {seed}") for file, seed in zip(files, request.sampling.seeds)]
    stats = news.stats
    details = [("target calls", f"{stats.target_calls}"), ("tokens", f"{stats.tokens}")]
    details += [("conditioning", "on what comes before only")] if news.approximate else []
    return (
        (readable(news.before), readable(news.images[0])),
        gr.update(value=captioned, visible=True, columns=max(2, columns_for(len(files))), selected_index=None),
        status_line(
            f"{images(request.sampling.count).capitalize()} in {duration(stats.seconds['total'])}.",
            state="done",
            details=[*details, ("seed", f"{request.sampling.seed}")],
        ),
    )


def _files(news: Redrawn, request: RedrawRequest) -> list[str]:
    sampling = request.sampling
    return [named_png(image, sampling.subject, seed, "edit") for image, seed in zip(news.images, sampling.seeds)]


async def answer_redrawing(
    image: Any, prompt: Any, mask: Any, box: Any, expand: Any, strength: Any, count: Any, seed: Any, model: Any,
    padding: Any, class_label: Any,
) -> AsyncIterator[tuple[Any, dict[str, Any]]]:  # fmt: skip
    """Redraw for a program: yields (images, details).

    Args:
        image, mask: what an upload answers.
        prompt, box, expand, strength, count, seed, model, padding, class_label: as of the endpoint.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    original = _opened(image, "Give an image first: upload a file.")
    white = box_mask(box, original.size) if mask in (None, "") else _opened(mask, "")
    numbers = (count, seed, None, strength, expand, padding)
    request = request_of(original, white, model, prompt, *numbers, class_label)
    async for news in redraw(request):
        if isinstance(news, Redrawing):
            yield gr.skip(), {"steps": news.steps, "seeds": request.sampling.seeds}
            continue
        stats = news.stats
        yield (
            [(file, f"seed {seed}") for file, seed in zip(_files(news, request), request.sampling.seeds)],
            {
                "model": request.sampling.model,
                "prompt": request.sampling.prompt,
                "class_label": request.sampling.class_label,
                "seeds": request.sampling.seeds,
                "size": list(news.before.size),
                "approximate": news.approximate,
                "target_calls": stats.target_calls,
                "tokens": stats.tokens,
                "seconds": dict(stats.seconds),
                "warning": news.warning,
            },
        )


def _opened(file: Any, missing: str) -> Any:
    path = uploaded(file)
    if not path:
        raise StudioError(missing)
    return open_image(path, Path(path).name, limits().pixels)


def painted(value: Any) -> tuple[Image, Image | None]:
    """The image in an editor, and what was painted over it: a mask of its size, white where paint is, or `None`.

    Args:
        value: what the browser sends of it: its files by "background" and "layers".

    Raises:
        StudioError: no image, or one that cannot be read.
    """
    value = value if isinstance(value, dict) else {}
    image = _opened(value.get("background"), "Give an image first: drop a file on the editor, or send one to it.")
    mask = PIL.Image.new("L", image.size)
    for file in (value.get("layers") or [])[:_MOST_LAYERS]:
        with PIL.Image.open(uploaded(file), formats=["PNG"]) as layer:
            if layer.size != image.size:
                raise StudioError("The paint does not have the size of the image: clear the editor and start again.")
            paint = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))
        mask.paste(255, (0, 0), paint)
    return image, mask if mask.getbbox() else None
