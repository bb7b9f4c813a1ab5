"""The Generate tab: images sampled from a prompt, with live previews."""

import dataclasses
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import gradio as gr

from studio import DECODINGS, decoding_named
from studio.checkpoints.class_names import class_number
from studio.ui.jobs.generate_job import Sampled, sample
from studio.ui.jobs.request import GenerateRequest, sample_seed
from studio.ui.jobs.side_by_side import side_by_side
from studio.ui.render import render_sampling
from studio.ui.render.render_side_by_side import render_side_by_side
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import limits
from studio.ui.server.models import (
    about_model,
    check_choice_of_model,
    class_names,
    fitting_decodings,
    own_settings,
)
from studio.ui.server.png_metadata import Form, from_image
from studio.ui.server.send_to import SEND_TO, SendTo, build_send_to
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import (
    count_slider,
    image_grid,
    status_line,
    uploaded,
)
from studio.ui.tabs.fields import number_field, options_field
from studio.ui.tabs.history import History, build_history, connect_history
from studio.ui.tabs.model_fields import (
    class_field,
    examples_of,
    model_field,
    own_setting,
    prompt_hint,
    settings_updates,
    subject_updates,
)

_TEMPERATURE = "Randomness of each token; 0 takes the likeliest."
IDLE = status_line("Say what to sample, and press Generate.")


def build_tab(model: str) -> tuple[SendTo, Form, History]:
    """Build the tab inside the current Blocks; the model is loaded by the first request.

    Args:
        model: the app's own, which is chosen at first.

    Returns:
        The buttons that send images to the tabs "edit", "tokenize" and "ask", the form that saved settings fill, and
        the strip of what the session has made.
    """
    with gr.Row(elem_id="studio-generate", elem_classes="studio-stage"):
        with gr.Column(elem_classes="area-ask"):
            prompt = gr.Textbox(
                label="Prompt",
                info=prompt_hint(model),
                placeholder="a red apple",
                lines=2,
                max_lines=6,
                autofocus=True,
                visible=class_names(model) is None,
                elem_id="prompt",
            )
            class_label = class_field(model, "class-label")
            with gr.Row(elem_classes="studio-actions"):
                generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=2)
                side_by_side_button = gr.Button("Side by side", elem_id="side-by-side", scale=1, min_width=96)
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False, scale=2)
            examples = gr.Dataset(
                components=[prompt],
                samples=[[text] for text in examples_of(model)],
                label="Try",
                elem_id="examples",
                elem_classes="studio-examples",
                type="values",
            )
        with gr.Column(elem_classes="area-show"):
            gallery = image_grid(label="Images", show_label=False, columns=2, elem_id="images")
            status = gr.HTML(IDLE, elem_id="status", elem_classes="studio-line")
            begins = [generate.click, prompt.submit, side_by_side_button.click]
            send_to = build_send_to(gallery, SEND_TO, begins)
            tokens = gr.HTML("", elem_id="tokens", elem_classes="studio-line")
            history = build_history(begins)
        with gr.Column(elem_classes="area-tune"):
            chosen = model_field(model, model, "model")
            decoding, options = _decoding_fields(fitting_decodings(model))
            most = limits().images
            count = count_slider(most, value=min(4, most), label="Images", elem_id="count")
            with gr.Row(elem_classes="studio-seed"):
                seed = number_field("Seed", "The same seed samples the same images.", "seed", "a new one each time")
                dice = gr.Button("Roll", elem_id="dice", size="sm", scale=0, min_width=0)
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                gr.Markdown("Empty fields use the defaults of the model, shown in grey.", elem_classes="studio-hint")
                own = own_settings(model)
                with gr.Row():
                    guidance = _setting("Guidance", "Classifier-free guidance scale; 1 is off.", own)
                    temperature = _setting("Temperature", _TEMPERATURE, own)
                with gr.Row(visible=_has_filters(own)) as filters:
                    top_k = _setting("Top-k", "Sample from the k likeliest tokens; 0 is all.", own)
                    top_p = _setting(
                        "Top-p", "Sample from the likeliest tokens of this total probability, 0 to 1.", own
                    )

            sampled = gr.File(
                label="Restore settings from an image",
                file_types=[".png"],
                height=132,
                elem_id="recall",
            )

    settings: dict[str, gr.Component] = {
        "guidance": guidance, "temperature": temperature, "top-k": top_k, "top-p": top_p,
    }  # fmt: skip

    def follow(name: str) -> dict[gr.Component, Any]:
        """What follows from a model."""
        fitting = fitting_decodings(name)
        return {
            chosen: gr.update(info=about_model(name)),
            decoding: gr.update(choices=_titles(fitting), value=fitting[0]),
            examples: gr.update(samples=[[text] for text in examples_of(name)]),
            filters: gr.update(visible=_has_filters(own_settings(name))),
            **subject_updates(name, prompt, class_label, prompt_hint(name)),
            **settings_updates(name, settings),
        }

    form = Form(model, chosen, [prompt, count, seed, *settings.values(), class_label], decoding, options, follow)

    async def show(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        async for update in show_sampling(*_with_options(values, options), default=model):
            yield update

    async def show_both(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        async for update in show_side_by_side(*_with_options(values, options)):
            yield update

    inputs, outputs = [history.past, *form.fields], [gallery, tokens, status, *history.outputs]
    connect_actions(
        [
            ([generate.click, prompt.submit], history.recorded(show), inputs, outputs),
            ([side_by_side_button.click], history.recorded(show_both), inputs, outputs),
        ],
        status,
        starts=[generate, side_by_side_button],
        cancel=cancel,
    )
    dice.click(sample_seed, None, seed, queue=False, **PRIVATE)
    chosen.input(
        lambda name, now: choose_model(form, name, now), [chosen, decoding], form.outputs, preprocess=False, **PRIVATE
    )
    sampled.upload(
        lambda file, name: {sampled: None, **recall(form, file, name)},
        [sampled, chosen],
        [sampled, *form.outputs],
        preprocess=False,
        **PRIVATE,
    )
    examples.click(_example, [examples, chosen], [prompt, class_label], queue=False, **PRIVATE)
    connect_history(history, form)
    _endpoint(model, prompt, count)
    return send_to, form, history


def _example(sample: list[str], model: str) -> tuple[Any, Any]:
    """Updates of the prompt and of the class."""
    classes = class_names(model)
    if classes is None:
        return sample[0], gr.skip()
    return gr.skip(), class_number(sample[0], classes)


def choose_model(form: Form, model: Any, decoding: Any) -> dict[gr.Component, Any]:
    """Updates of the form after a choice of a model; an error becomes a toast, and the form stays as it is."""
    try:
        return form.choose(model, decoding)
    except Exception as error:
        toast(sentence_of(error))
        return {}


def recall(form: Form, file: Any, model: Any = None) -> dict[gr.Component, Any]:
    """Updates of the form from the settings of an image; an error becomes a toast, and the form stays as it is.

    Args:
        form: to fill.
        file: what an upload answers.
        model: the name of the model that is chosen.
    """
    try:
        return form.filled(from_image(uploaded(file)), model)
    except Exception as error:
        toast(sentence_of(error))
        return {}


def _decoding_fields(fitting: Sequence[str]) -> tuple[gr.Radio, dict[tuple[str, str], gr.Component]]:
    """The field of the decoding, and by (decoding, option) the fields of options, shown when it is chosen.

    There are fields for the decodings of all models; those of `fitting` can be chosen at first.
    """
    plain = fitting[0]
    summary = DECODINGS[plain].summary
    decoding = gr.Radio(_titles(fitting), value=plain, label="Decoding", info=summary, elem_id="decoding")
    fields: dict[tuple[str, str], gr.Component] = {}
    rows: dict[str, gr.Row] = {}
    for name, choice in DECODINGS.items():
        is_shown = name == plain and bool(choice.options)
        with gr.Row(visible=is_shown, elem_classes="studio-options") as rows[name]:
            for option in choice.options:
                fields[name, option.name] = _option_field(option, re.sub(r"\W", "-", f"{name}-{option.name}"))

    def choose(chosen: str) -> tuple[Any, ...]:
        shown = [gr.update(visible=name == chosen and bool(DECODINGS[name].options)) for name in rows]
        return gr.update(info=decoding_named(chosen).summary), *shown

    decoding.change(choose, decoding, [decoding, *rows.values()], queue=False, **PRIVATE)
    return decoding, fields


def _titles(decodings: Sequence[str]) -> list[tuple[str, str]]:
    return [(DECODINGS[name].title, name) for name in decodings]


def _has_filters(own: Mapping[str, str]) -> bool:
    """Whether a model of these own settings samples from codes, which filters leave some of."""
    return not own or "top-k" in own


def _option_field(option: Any, elem_id: str) -> gr.Component:
    title = option.name.replace("_", " ").capitalize()
    if option.choices:
        own = [("its own", "")] if option.default is None else []
        named = [*own, *((text, value) for value, text in option.choices.items())]
        return gr.Radio(named, value=option.default or "", label=title, info=option.summary, elem_id=elem_id)
    return number_field(title, option.summary, elem_id, option.shown_default)


def _with_options(values: Sequence[Any], fields: Mapping[tuple[str, str], Any]) -> tuple[Any, ...]:
    """The values of a form, whose last ones are of options, as `GenerateRequest.from_fields` takes them."""
    model, prompt, *settings, class_label, decoding = values[: len(values) - len(fields)]
    texts = zip(fields, values[len(values) - len(fields) :])
    named = {option: text for (owner, option), text in texts if owner == decoding}
    return model, prompt, *settings, decoding, named, "" if class_label is None else class_label


def _endpoint(default: str, prompt: gr.Textbox, count: gr.Slider) -> None:
    """The endpoint for programs."""

    async def generate(
        prompt,
        count=4,
        seed=None,
        guidance=None,
        temperature=None,
        top_k=None,
        top_p=None,
        decoding=None,
        options=None,
        model=None,
        class_label=None,
    ):
        """Sample images from a prompt; streams previews, then the finished images.

        Args:
            prompt: what to sample, up to 2,000 characters (a server may allow fewer), such as "a red apple".
            count: how many images, 1 to 16; a server may allow fewer.
            seed: seed of the first image, the next use seed + 1 and so on; sampled when empty.
            guidance: classifier-free guidance scale (1 is off); the model's default when empty.
            temperature: randomness of each token (0 takes the likeliest); the model's default when empty.
            top_k: sample from the k likeliest tokens (0 is all); the model's default when empty.
            top_p: sample from the likeliest tokens of this total probability, 0 to 1; the model's default when empty.
            decoding: how tokens are generated, such as "jacobi" ("cspd" may be approximate); its default when empty.
            options: those of the decoding, such as {"delta": 0.1}; its defaults when empty.
            model: what samples, such as "emoji-mar"; the app's own model when empty.
            class_label: number or name of a class, for a class-conditional model; when empty, the prompt is its name.

        Returns:
            The images as PNG files, and details: seeds, tokens, target calls and seconds, or the progress so far.
        """
        name = check_choice_of_model(model or default)
        values = (prompt, count, seed, guidance, temperature, top_k, top_p, decoding or fitting_decodings(name)[0])
        async for update in answer_sampling(name, *values, options or {}, class_label=class_label):
            yield update

    with gr.Group(visible=False):
        numbers = [gr.Number(label=name) for name in ("Seed", "Guidance", "Temperature", "Top-k", "Top-p")]
        decoding, options = gr.Textbox(label="Decoding"), options_field("Options")
        model, class_label = gr.Textbox(label="Model"), gr.Textbox(label="Class")
        found, details = image_grid(label="Images"), gr.JSON(label="Details")
        endpoint = gr.Button("Generate")
    inputs = [prompt, count, *numbers, decoding, options, model, class_label]
    endpoint.click(generate, inputs, [found, details], api_name="generate", **ON_THE_MODEL)


async def show_sampling(model: str, *values: Any, default: str | None = None) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Sample for the page: yields updates of (gallery, tokens, status).

    An error becomes a toast that says what to do; images and fields stay as they are.

    Args:
        model: what samples.
        values: the other arguments of `GenerateRequest.from_fields`.
        default: the app's own model, which links need not name; `model` when `None`.
    """
    shown: Any = None
    warned = False
    try:
        request = GenerateRequest.from_fields(check_choice_of_model(model), *values)
        async for news in sample(request):
            if news.warning and not warned:
                toast(news.warning, title="Please note", duration=12)
                warned = True
            if isinstance(news, Sampled):
                yield (
                    render_sampling.gallery(render_sampling.image_files(news.images, request), request),
                    render_sampling.draft_tokens(news.trace),
                    render_sampling.summary(news, request, default or model),
                )
            elif news.images is not shown:
                shown = news.images
                yield (
                    render_sampling.gallery(shown, request),
                    render_sampling.draft_tokens(news.trace),
                    render_sampling.progress(news, request),
                )
            else:
                yield gr.skip(), gr.skip() if news.sampled != 1 else "", render_sampling.progress(news, request)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def show_side_by_side(model: str, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Sample by two decodings for the page: yields updates as `show_sampling` does, of the same values."""
    shown: Any = None
    warned = False
    try:
        request = GenerateRequest.from_fields(check_choice_of_model(model), *values)
        async for news in side_by_side(request):
            if news.warning and not warned:
                toast(news.warning, title="Please note", duration=12)
                warned = True
            if not news.runs:
                yield gr.skip(), gr.skip(), render_sampling.LOADING
                continue
            found = [run.image for run in news.runs]
            fresh = found != shown and all(found)
            shown = found if fresh else shown
            yield (
                render_sampling.sides(news, request) if fresh else gr.skip(),
                render_side_by_side(news),
                render_sampling.side_by_side_status(news, request),
            )
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def answer_sampling(
    model: str, *values: Any, class_label: Any = None
) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """Sample for a program: yields (images, details).

    Args:
        model: what samples.
        values: the other arguments of `GenerateRequest`, in its order.
        class_label: as of `GenerateRequest`.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    request = dataclasses.replace(GenerateRequest(model, *values), class_label=class_label)
    async for news in sample(request):
        if isinstance(news, Sampled):
            yield (
                render_sampling.captioned(render_sampling.image_files(news.images, request), request),
                render_sampling.details(news, request),
            )
        elif news.ahead is not None:
            yield gr.skip(), {"waiting": news.ahead, "seeds": request.seeds}
        elif news.total:
            yield (
                render_sampling.captioned(news.images, request) if news.images else gr.skip(),
                {"sampled": news.sampled, "total": news.total, "seeds": request.seeds},
            )


def _setting(label: str, info: str, own: Mapping[str, str]) -> gr.Textbox:
    name = label.lower()
    return number_field(label, info, name, own_setting(own, name))
