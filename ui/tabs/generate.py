"""The Generate tab: images sampled from a prompt, with live previews."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import gradio as gr
from PIL.Image import Image

from studio import DECODINGS, decoding_named
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Progress, Sampled, sample
from studio.ui.jobs.request import GenerateRequest, sample_seed
from studio.ui.jobs.side_by_side import Run, SideBySide, side_by_side
from studio.ui.render.render_side_by_side import render_side_by_side, side_by_side_verdict
from studio.ui.render.token_grid import token_grid
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import limits
from studio.ui.server.models import fitting_decodings, own_settings
from studio.ui.server.png_metadata import Form, from_image, link_to
from studio.ui.server.send_to import SendTo, build_send_to
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
from studio.ui.tabs.fields import number_field, options_field

EXAMPLES = [
    "a red apple",
    "a rocket, flat style, on a blue background",
    "an octopus, 3d style, on a pink background",
    "a hot beverage, 3d style",
    "a rainbow, on a purple background",
    "a fox, flat style",
]
_TEMPERATURE = "Randomness of each token; 0 takes the likeliest."
IDLE = status_line("Write a prompt and press Generate.")
LOADING = status_line("Loading the model …", state="running", fraction=0)


def build_tab(model: str) -> tuple[SendTo, Form]:
    """Build the tab inside the current Blocks; the model is loaded by the first request.

    Args:
        model: what samples.

    Returns:
        The buttons that send images to the tabs "edit", "tokenize" and "ask", and the form that saved settings fill.
    """
    with gr.Row(elem_id="studio-generate", elem_classes="studio-stage"):
        with gr.Column(elem_classes="area-ask"):
            prompt = gr.Textbox(
                label="Prompt",
                info="A thing; a style, 3d or flat; a background colour.",
                placeholder="a red apple",
                lines=2,
                max_lines=6,
                autofocus=True,
                elem_id="prompt",
            )
            with gr.Row(elem_classes="studio-actions"):
                generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=2)
                side_by_side_button = gr.Button("Side by side", elem_id="side-by-side", scale=1, min_width=96)
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False, scale=2)
            examples = gr.Dataset(
                components=[prompt],
                samples=[[text] for text in EXAMPLES],
                label="Try",
                elem_id="examples",
                elem_classes="studio-examples",
                type="values",
            )
        with gr.Column(elem_classes="area-show"):
            gallery = image_grid(label="Images", show_label=False, columns=2, elem_id="images")
            status = gr.HTML(IDLE, elem_id="status", elem_classes="studio-line")
            send_to = build_send_to(
                gallery,
                {"edit": "Edit this", "tokenize": "Tokenize this", "ask": "Ask about this image"},
                [generate.click, prompt.submit, side_by_side_button.click],
            )
            tokens = gr.HTML("", elem_id="tokens", elem_classes="studio-line")
        with gr.Column(elem_classes="area-tune"):
            fitting = fitting_decodings(model)
            decoding, options = _decoding_fields(fitting)
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
                with gr.Row(visible=not own or "top-k" in own):
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

    form = Form(model, [prompt, count, seed, guidance, temperature, top_k, top_p], decoding, options, fitting)

    async def show(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        async for update in show_sampling(model, *_with_options(values, options)):
            yield update

    async def show_both(*values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        async for update in show_side_by_side(model, *_with_options(values, options)):
            yield update

    connect_actions(
        [
            ([generate.click, prompt.submit], show, form.fields, [gallery, tokens, status]),
            ([side_by_side_button.click], show_both, form.fields, [gallery, tokens, status]),
        ],
        status,
        starts=[generate, side_by_side_button],
        cancel=cancel,
    )
    dice.click(sample_seed, None, seed, queue=False, **PRIVATE)
    sampled.upload(lambda file: recall(form, file), sampled, [sampled, *form.fields], preprocess=False, **PRIVATE)
    examples.click(lambda sample: sample[0], examples, prompt, queue=False, **PRIVATE)
    _endpoint(model, prompt, count, fitting[0])
    return send_to, form


def recall(form: Form, file: Any) -> tuple[Any, ...]:
    """Fill the form with the settings of an uploaded image; an error becomes a toast, and the form stays as it is.

    Args:
        form: to fill.
        file: what an upload answers.

    Returns:
        Updates of the field of the file, which is cleared, and of the fields of the form.
    """
    try:
        return None, *form.filled(from_image(uploaded(file)))
    except Exception as error:
        toast(sentence_of(error))
        return None, *[gr.skip()] * len(form.fields)


def _decoding_fields(fitting: Sequence[str]) -> tuple[gr.Radio, dict[tuple[str, str], gr.Component]]:
    """The field of the decoding, and by (decoding, option) the fields of options, shown when it is chosen."""
    choices = {name: DECODINGS[name] for name in fitting}
    plain = fitting[0]
    names = [(choice.title, name) for name, choice in choices.items()]
    decoding = gr.Radio(names, value=plain, label="Decoding", info=choices[plain].summary, elem_id="decoding")
    fields: dict[tuple[str, str], gr.Component] = {}
    rows: dict[str, gr.Row] = {}
    for name, choice in choices.items():
        is_shown = name == plain and bool(choice.options)
        with gr.Row(visible=is_shown, elem_classes="studio-options") as rows[name]:
            for option in choice.options:
                fields[name, option.name] = _option_field(option, re.sub(r"\W", "-", f"{name}-{option.name}"))

    def choose(chosen: str) -> tuple[Any, ...]:
        shown = [gr.update(visible=name == chosen and bool(DECODINGS[name].options)) for name in rows]
        return gr.update(info=decoding_named(chosen).summary), *shown

    decoding.change(choose, decoding, [decoding, *rows.values()], queue=False, **PRIVATE)
    return decoding, fields


def _option_field(option: Any, elem_id: str) -> gr.Component:
    title = option.name.replace("_", " ").capitalize()
    if option.choices:
        own = [("its own", "")] if option.default is None else []
        named = [*own, *((text, value) for value, text in option.choices.items())]
        return gr.Radio(named, value=option.default or "", label=title, info=option.summary, elem_id=elem_id)
    default = "its own" if option.default is None else f"{option.default:g}"
    return number_field(title, option.summary, elem_id, default)


def _with_options(values: Sequence[Any], fields: Mapping[tuple[str, str], Any]) -> tuple[Any, ...]:
    """The values of a form, whose last ones are of options, as `GenerateRequest.from_fields` takes them."""
    *basic, decoding = values[: len(values) - len(fields)]
    texts = zip(fields, values[len(values) - len(fields) :])
    return *basic, decoding, {option: text for (owner, option), text in texts if owner == decoding}


def _endpoint(model: str, prompt: gr.Textbox, count: gr.Slider, default: str) -> None:
    """The endpoint for programs."""

    async def generate(
        prompt,
        count=4,
        seed=None,
        guidance=None,
        temperature=None,
        top_k=None,
        top_p=None,
        decoding=default,
        options=None,
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
            decoding: how tokens are generated, such as "jacobi"; "cspd" with the mode "relaxed" is approximate.
            options: those of the decoding, such as {"delta": 0.1}; its defaults when empty.

        Returns:
            The images as PNG files, and details: seeds, tokens, target calls and seconds, or the progress so far.
        """
        values = (prompt, count, seed, guidance, temperature, top_k, top_p, decoding, options or {})
        async for update in answer_sampling(model, *values):
            yield update

    with gr.Group(visible=False):
        numbers = [gr.Number(label=name) for name in ("Seed", "Guidance", "Temperature", "Top-k", "Top-p")]
        decoding, options = gr.Textbox(default, label="Decoding"), options_field("Options")
        found, details = image_grid(label="Images"), gr.JSON(label="Details")
        endpoint = gr.Button("Generate")
    inputs = [prompt, count, *numbers, decoding, options]
    endpoint.click(generate, inputs, [found, details], api_name="generate", **ON_THE_MODEL)


async def show_sampling(model: str, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Sample for the page: yields updates of (gallery, tokens, status).

    An error becomes a toast that says what to do; images and fields stay as they are.

    Args:
        model: what samples.
        values: the other arguments of `GenerateRequest.from_fields`.
    """
    shown: Any = None
    warned = False
    try:
        request = GenerateRequest.from_fields(model, *values)
        async for news in sample(request):
            if news.warning and not warned:
                toast(news.warning, title="Please note", duration=12)
                warned = True
            if isinstance(news, Sampled):
                yield _gallery(_files(news.images, request), request), _tokens(news.trace), summary(news, request)
            elif news.images is not shown:
                shown = news.images
                yield _gallery(shown, request), _tokens(news.trace), progress(news, request)
            else:
                yield gr.skip(), gr.skip() if news.sampled != 1 else "", progress(news, request)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def show_side_by_side(model: str, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Sample by two decodings for the page: yields updates as `show_sampling` does, of the same values."""
    shown: Any = None
    warned = False
    try:
        request = GenerateRequest.from_fields(model, *values)
        async for news in side_by_side(request):
            if news.warning and not warned:
                toast(news.warning, title="Please note", duration=12)
                warned = True
            if not news.runs:
                yield gr.skip(), gr.skip(), LOADING
                continue
            found = [run.image for run in news.runs]
            fresh = found != shown and all(found)
            shown = found if fresh else shown
            yield (
                _sides(news, request) if fresh else gr.skip(),
                render_side_by_side(news),
                side_by_side_status(news, request),
            )
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def answer_sampling(model: str, *values: Any) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """Sample for a program: yields (images, details).

    Args:
        model: what samples.
        values: the other arguments of `GenerateRequest`, in its order.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    request = GenerateRequest(model, *values)
    async for news in sample(request):
        if isinstance(news, Sampled):
            yield _captioned(_files(news.images, request), request), _details(news, request)
        elif news.ahead is not None:
            yield gr.skip(), {"waiting": news.ahead, "seeds": request.seeds}
        elif news.total:
            yield (
                _captioned(news.images, request) if news.images else gr.skip(),
                {"sampled": news.sampled, "total": news.total, "seeds": request.seeds},
            )


def progress(news: Progress, request: GenerateRequest) -> str:
    """The status line of a request under way."""
    if news.ahead is not None:
        return status_line(waiting(news.ahead), state="running", fraction=0)
    if not news.total:
        return LOADING
    text = f"Sampling {images(request.count)}: {news.sampled} of {news.total} tokens"
    if news.seconds > 0.3:
        rate = (news.sampled - 1) / news.seconds
        text += f", {rate * request.count:.0f} tokens/s, {duration((news.total - news.sampled) / max(rate, 1e-6))} left"
    return status_line(text, state="running", fraction=news.sampled / news.total)


def waiting(ahead: int) -> str:
    """The status of a request that waits for at most so many turns of others."""
    return "Waiting: you are next." if ahead == 1 else f"Waiting: at most {ahead} turns before yours."


def summary(sampled: Sampled, request: GenerateRequest) -> str:
    """The status line of a finished request."""
    stats = sampled.stats
    seeds = f"{request.seeds[0]}" if request.count == 1 else f"{request.seeds[0]} to {request.seeds[-1]}"
    accepted = [] if stats.acceptance is None else [("drafts accepted", f"{stats.acceptance:.0%}")]
    approximate = [("images", "approximate")] if "approximate" in request.how else []
    taken = [] if stats.decoding is None else [("decoding", decoding_named(stats.decoding).title.lower())]
    return status_line(
        f"{images(request.count).capitalize()} in {duration(stats.seconds['total'])}.",
        state="done",
        details=[
            ("tokens/s", f"{_rate(stats):.0f}"),
            ("tokens", f"{stats.tokens}"),
            ("target calls", f"{stats.target_calls}"),
            ("tokens per call", f"{stats.mean_accepted_length:.2f}"),
            *accepted,
            *approximate,
            *taken,
            ("seed" if request.count == 1 else "seeds", seeds),
        ],
        link=("Link to these settings", link_to(request)),
    )


def side_by_side_status(news: SideBySide, request: GenerateRequest) -> str:
    """The status line of two decodings side by side."""
    if news.finished:
        return status_line(side_by_side_verdict(news), state="done", details=[("seed", f"{request.seed}")])
    fraction = sum(run.sampled for run in news.runs) / sum(run.total for run in news.runs)
    far = ", ".join(f"{run.title} {run.sampled}" for run in news.runs)
    text = f"Sampling in turns: {far} of {news.runs[0].total} tokens"
    return status_line(text, state="running", fraction=fraction)


def _setting(label: str, info: str, own: Mapping[str, str]) -> gr.Textbox:
    name = label.lower()
    return number_field(label, info, name, own.get(name, "model's own"))


def _gallery(sampled: Sequence[Any], request: GenerateRequest) -> Any:
    return gr.update(value=_captioned(sampled, request), columns=columns_for(request.count), selected_index=None)


def _sides(news: SideBySide, request: GenerateRequest) -> Any:
    found = [(_image_or_file(run, request), f"{run.title} · seed {request.seed}") for run in news.runs]
    return gr.update(value=found, columns=2, selected_index=None)


def _image_or_file(run: Run, request: GenerateRequest) -> Any:
    """A preview, or the finished image as a file whose name says what it is."""
    return named_png(run.image, request.prompt, request.seeds[0], run.title) if run.image and run.stats else run.image


def _tokens(trace: DraftTrace | None) -> str:
    return token_grid(trace, "Tokens of the first image") if trace else ""


def _files(sampled: Sequence[Image], request: GenerateRequest) -> list[str]:
    """Finished images as files whose names say what they are."""
    return [named_png(image, request.prompt, seed) for image, seed in zip(sampled, request.seeds)]


def _captioned(sampled: Sequence[Any], request: GenerateRequest) -> list[tuple[Any, str]]:
    prompt = " ".join(request.prompt.split())
    return [(image, f"seed {seed} · {prompt}") for image, seed in zip(sampled, request.seeds)]


def _details(sampled: Sampled, request: GenerateRequest) -> dict[str, Any]:
    stats = sampled.stats
    return {
        "model": str(request.model),
        "prompt": request.prompt,
        "seeds": request.seeds,
        "settings": request.settings,
        "decoding": request.how,
        "tokens": stats.tokens,
        "target_calls": stats.target_calls,
        "mean_accepted_length": stats.mean_accepted_length,
        "taken": stats.decoding,
        "window": stats.window,
        "tokens_per_second": round(_rate(stats), 1),
        "seconds": dict(stats.seconds),
        "sampled_together": sampled.batch_size,
        "warning": sampled.warning,
    }


def _rate(stats: Any) -> float:
    return stats.tokens / max(stats.seconds["decode"], 1e-9)
