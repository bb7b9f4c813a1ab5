"""The Generate tab: words in, images out, sampled before your eyes."""

import re

import gradio as gr

from studio import DECODINGS, decoding_named
from studio.ui.jobs.generate_job import Sampled, sample
from studio.ui.jobs.request import GenerateRequest, sample_seed
from studio.ui.jobs.side_by_side import race
from studio.ui.render.render_side_by_side import render_side_by_side, side_by_side_verdict
from studio.ui.render.token_grid import token_grid
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import limits
from studio.ui.server.models import fitting_decodings, own_settings
from studio.ui.server.png_metadata import Form, from_image, link_to
from studio.ui.server.send_to import build_send_to
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import columns_for, count_slider, duration, image_grid, images, status_line, uploaded
from studio.ui.tabs.fields import number_field, options_field

EXAMPLES = [
    "a red apple",
    "a rocket, flat style, on a blue background",
    "an octopus, 3d style, on a pink background",
    "a hot beverage, 3d style",
    "a rainbow, on a purple background",
    "a fox, flat style",
]
_TEMPERATURE = "Below 1 calmer, above 1 wilder; at 0 only a style and a background that the prompt leaves open vary."
IDLE = status_line("Say what to sample and press Generate.")
LOADING = status_line("Loading the model …", state="running", fraction=0)


def build_tab(model):
    """Lay the tab out inside the current Blocks and connect it; the model is loaded by the first sampling.

    Returns:
        The `SendTo` by which images go to the tabs "tokenize" and "ask", and the `Form` to which settings come back.
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
                side_by_side_button = gr.Button("SideBySide", elem_id="race", scale=1, min_width=96)
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
                {"tokenize": "Tokenize this", "ask": "Ask about this image"},
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
                gr.Markdown("Empty fields take the model's own setting, shown in grey.", elem_classes="studio-hint")
                own = own_settings(model)
                with gr.Row():
                    guidance = _setting("Guidance", "How closely to follow the words; 1 is off.", own)
                    temperature = _setting("Temperature", _TEMPERATURE, own)
                with gr.Row(visible=not own or "top-k" in own):
                    top_k = _setting("Top-k", "Only the k likeliest tokens; 0 is all.", own)
                    top_p = _setting("Top-p", "Only this share of likelihood, 0 to 1.", own)

            sampled = gr.File(
                label="An image that Studio drew brings its settings back",
                file_types=[".png"],
                height=132,
                elem_id="recall",
            )

    form = Form(model, [prompt, count, seed, guidance, temperature, top_k, top_p], decoding, options, fitting)

    async def show(*values):
        async for update in show_sampling(model, *_with_options(values, options)):
            yield update

    async def show_sides(*values):
        async for update in show_side_by_side(model, *_with_options(values, options)):
            yield update

    connect_actions(
        [
            ([generate.click, prompt.submit], show, form.fields, [gallery, tokens, status]),
            ([side_by_side_button.click], show_sides, form.fields, [gallery, tokens, status]),
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


def recall(form, file):
    """Bring the settings of an uploaded image back: updates of the file's field, now empty again, and of the form's.

    What is wrong becomes a toast, and the form stays as it is.
    """
    try:
        return None, *form.filled(from_image(uploaded(file)))
    except Exception as error:
        toast(sentence_of(error))
        return None, *[gr.skip()] * len(form.fields)


def _decoding_fields(fitting):
    """The choice of a decoding, and by (decoding, option) the fields of its options, shown when it is chosen."""
    choices = {name: DECODINGS[name] for name in fitting}
    plain = fitting[0]
    names = [(choice.title, name) for name, choice in choices.items()]
    decoding = gr.Radio(names, value=plain, label="Decoding", info=choices[plain].summary, elem_id="decoding")
    fields, rows = {}, {}
    for name, choice in choices.items():
        is_shown = name == plain and bool(choice.options)
        with gr.Row(visible=is_shown, elem_classes="studio-options") as rows[name]:
            for option in choice.options:
                fields[name, option.name] = _option_field(option, re.sub(r"\W", "-", f"{name}-{option.name}"))

    def choose(chosen):
        shown = [gr.update(visible=name == chosen and bool(DECODINGS[name].options)) for name in rows]
        return gr.update(info=decoding_named(chosen).summary), *shown

    decoding.change(choose, decoding, [decoding, *rows.values()], queue=False, **PRIVATE)
    return decoding, fields


def _option_field(option, elem_id):
    title = option.name.replace("_", " ").capitalize()
    if option.choices:
        named = [(text, value) for value, text in option.choices.items()]
        return gr.Radio(named, value=option.default, label=title, info=option.summary, elem_id=elem_id)
    usual = "its own" if option.default is None else f"{option.default:g}"
    return number_field(title, option.summary, elem_id, usual)


def _with_options(values, fields):
    """The values of a form with those of all options behind it, as `GenerateRequest.from_fields` takes them."""
    *basic, decoding = values[: len(values) - len(fields)]
    texts = zip(fields, values[len(values) - len(fields) :])
    return *basic, decoding, {option: text for (owner, option), text in texts if owner == decoding}


def _endpoint(model, prompt, count, plain):
    """What programs call."""

    async def generate(
        prompt,
        count=4,
        seed=None,
        guidance=None,
        temperature=None,
        top_k=None,
        top_p=None,
        decoding=plain,
        options=None,
    ):
        """Sample images from words; streams previews, then the finished images.

        Args:
            prompt: what to sample, up to 2,000 characters (a server may allow fewer), such as "a red apple".
            count: how many images, 1 to 16; a server may allow fewer.
            seed: seed of the first image, the next use seed + 1 and so on; sampled when empty.
            guidance: how closely to follow the prompt (1 is off); the model's own setting when empty.
            temperature: randomness of each token; at 0 only a style and a background that the prompt leaves open vary.
            top_k: sample from the k likeliest tokens (0 is all); the model's own setting when empty.
            top_p: sample from the likeliest tokens that make up this share, 0 to 1; the model's own setting when empty.
            decoding: how tokens are generated, such as "jacobi"; "cspd" with the mode "relaxed" is approximate.
            options: those of the decoding, such as {"delta": 0.1}; its usual ones when empty.

        Returns:
            The images as PNG files, and details: seeds, tokens, target calls and seconds, or the progress so far.
        """
        request = (prompt, count, seed, guidance, temperature, top_k, top_p, decoding, options or {})
        async for update in answer_sampling(model, *request):
            yield update

    with gr.Group(visible=False):
        numbers = [gr.Number(label=name) for name in ("Seed", "Guidance", "Temperature", "Top-k", "Top-p")]
        decoding, options = gr.Textbox(plain, label="Decoding"), options_field("Options")
        found, details = image_grid(label="Images"), gr.JSON(label="Details")
        endpoint = gr.Button("Generate")
    inputs = [prompt, count, *numbers, decoding, options]
    endpoint.click(generate, inputs, [found, details], api_name="generate", **ON_THE_MODEL)


async def show_sampling(model, *values):
    """Sample for the page: yields updates of (gallery, tokens, status).

    What is wrong becomes a toast that says what to do; images and fields stay as they are.
    """
    shown = warned = None
    try:
        request = GenerateRequest.from_fields(model, *values)
        async for news in sample(request):
            if news.warning and not warned:
                toast(news.warning, title="Please note", duration=12)
                warned = True
            if isinstance(news, Sampled):
                yield _gallery(news.images, request), _tokens(news.trace), summary(news, request)
            elif news.images is not shown:
                shown = news.images
                yield _gallery(shown, request), _tokens(news.trace), progress(news, request)
            else:
                yield gr.skip(), gr.skip() if news.sampled != 1 else "", progress(news, request)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def show_side_by_side(model, *values):
    """SideBySide for the page: yields updates as `show_sampling` does."""
    shown = warned = None
    try:
        request = GenerateRequest.from_fields(model, *values)
        async for news in race(request):
            if news.warning and not warned:
                toast(news.warning, title="Please note", duration=12)
                warned = True
            if not news.lanes:
                yield gr.skip(), gr.skip(), LOADING
                continue
            found = [lane.image for lane in news.lanes]
            fresh = found != shown and all(found)
            shown = found if fresh else shown
            yield _sides(news, request) if fresh else gr.skip(), render_side_by_side(news), side_by_side_status(news, request)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def answer_sampling(model, *values):
    """Sample for a program: yields (images, details); what is wrong becomes an error with the same sentence."""
    *basic, decoding, options = values
    request = GenerateRequest(model, *basic, decoding=decoding, options=options)
    async for news in sample(request):
        if isinstance(news, Sampled):
            yield _captioned(news.images, request), _details(news, request)
        elif news.ahead is not None:
            yield gr.skip(), {"waiting": news.ahead, "seeds": request.seeds}
        elif news.total:
            yield (
                _captioned(news.images, request) if news.images else gr.skip(),
                {"sampled": news.sampled, "total": news.total, "seeds": request.seeds},
            )


def progress(news, request):
    """The status line of a sampling under way."""
    if news.ahead is not None:
        return status_line(waiting(news.ahead), state="running", fraction=0)
    if not news.total:
        return LOADING
    text = f"Sampling {images(request.count)}: {news.sampled} of {news.total} tokens"
    if news.seconds > 0.3:
        rate = (news.sampled - 1) / news.seconds
        text += f", {rate * request.count:.0f} tokens/s, {duration((news.total - news.sampled) / max(rate, 1e-6))} left"
    return status_line(text, state="running", fraction=news.sampled / news.total)


def waiting(ahead):
    """What is said to somebody who waits for so many turns of others."""
    return "Waiting: you are next." if ahead == 1 else f"Waiting: at most {ahead} turns before yours."


def summary(sampled, request):
    """The status line of a finished sampling."""
    stats = sampled.stats
    seeds = f"{request.seeds[0]}" if request.count == 1 else f"{request.seeds[0]} to {request.seeds[-1]}"
    accepted = [] if stats.acceptance is None else [("drafts accepted", f"{stats.acceptance:.0%}")]
    distribution = [("images", "approximate")] if "approximate" in request.how else []
    taken = [] if stats.decoding is None else [("decoding", decoding_named(stats.decoding).title.lower())]
    return status_line(
        f"{images(request.count).capitalize()} in {duration(stats.seconds['total'])}.",
        state="done",
        details=[
            ("tokens/s", f"{_rate(stats):.0f}"),
            ("tokens", f"{stats.tokens}"),
            ("target calls", f"{stats.target_calls}"),
            ("tokens a call", f"{stats.mean_accepted_length:.2f}"),
            *accepted,
            *distribution,
            *taken,
            ("seed" if request.count == 1 else "seeds", seeds),
        ],
        link=("Link to these settings", link_to(request)),
    )


def side_by_side_status(news, request):
    """The status line of a race."""
    if news.finished:
        return status_line(side_by_side_verdict(news), state="done", details=[("seed", f"{request.seed}")])
    share = sum(lane.sampled for lane in news.lanes) / sum(lane.total for lane in news.lanes)
    far = ", ".join(f"{lane.title} {lane.sampled}" for lane in news.lanes)
    text = f"Racing, by turns so that neither slows the other: {far} of {news.lanes[0].total} tokens"
    return status_line(text, state="running", fraction=share)


def _setting(label, info, own):
    name = label.lower()
    return number_field(label, info, name, own.get(name, "model's own"))


def _gallery(sampled, request):
    return gr.update(value=_captioned(sampled, request), columns=columns_for(request.count), selected_index=None)


def _sides(news, request):
    found = [(lane.image, f"{lane.title} · seed {request.seed}") for lane in news.lanes]
    return gr.update(value=found, columns=2, selected_index=None)


def _tokens(trace):
    return token_grid(trace, "Tokens of the first image") if trace else ""


def _captioned(sampled, request):
    prompt = " ".join(request.prompt.split())
    return [(image, f"seed {seed} · {prompt}") for image, seed in zip(sampled, request.seeds)]


def _details(sampled, request):
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


def _rate(stats):
    return stats.tokens / max(stats.seconds["decode"], 1e-9)
