"""The Generate tab: words in, pictures out, drawn before your eyes."""

import logging

import gradio as gr

from studio.errors import StudioError
from studio.ui.components import columns_for, picture_grid, pictures, status_line
from studio.ui.drawing import MOST_PICTURES, Drawn, Wish, draw, draw_seed
from studio.ui.models import own_settings

EXAMPLES = [
    "a red apple",
    "a rocket, flat style, on a blue background",
    "an octopus, 3d style, on a pink background",
    "a hot beverage, 3d style",
    "a rainbow, on a purple background",
    "a fox, flat style",
]
IDLE = status_line("Say what to draw and press Generate.")
QUEUED = status_line("Waiting for the model …", state="running", fraction=0)
STOPPED = status_line("Stopped. What was drawn so far stays here.", state="stopped")
FAILED = status_line("That did not work. Your prompt and settings are unchanged.", state="stopped")

logger = logging.getLogger(__name__)


def build_tab(model):
    """Lay the tab out inside the current Blocks and connect it; the model is loaded by the first drawing."""
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
                cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False, scale=2)
            examples = gr.Dataset(
                components=[prompt],
                samples=[[text] for text in EXAMPLES],
                label="Try",
                elem_id="examples",
                type="values",
            )
        with gr.Column(elem_classes="area-show"):
            gallery = picture_grid(label="Pictures", show_label=False, columns=2, elem_id="pictures")
            status = gr.HTML(IDLE, elem_id="status")
        with gr.Column(elem_classes="area-tune"):
            count = gr.Slider(1, MOST_PICTURES, value=4, step=1, label="Pictures", elem_id="count", buttons=[])
            with gr.Row(elem_classes="studio-seed"):
                seed = _field("Seed", "The same seed draws the same pictures.", "seed", "a new one each time")
                dice = gr.Button("Roll", elem_id="dice", size="sm", scale=0, min_width=0)
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                gr.Markdown("Empty fields take the model's own setting, shown in grey.", elem_classes="studio-hint")
                own = own_settings(model)
                with gr.Row():
                    guidance = _setting("Guidance", "How closely to follow the words; 1 is off.", own)
                    temperature = _setting("Temperature", "Below 1 calmer, above 1 wilder.", own)
                with gr.Row():
                    top_k = _setting("Top-k", "Only the k likeliest tokens; 0 is all.", own)
                    top_p = _setting("Top-p", "Only this share of likelihood, 0 to 1.", own)

    wish = [prompt, count, seed, guidance, temperature, top_k, top_p]
    outputs = [gallery, status, generate, cancel]
    private = {"api_visibility": "private"}

    async def show(*values):
        async for update in show_drawing(model, *values):
            yield update

    async def answer(prompt, count=4, seed=None, guidance=None, temperature=None, top_k=None, top_p=None):
        """Draw pictures from words; streams previews, then the finished pictures.

        Args:
            prompt: what to draw, up to 2,000 characters, such as "a red apple".
            count: how many pictures, 1 to 16.
            seed: seed of the first picture, the next use seed + 1 and so on; drawn when empty.
            guidance: how closely to follow the prompt (1 is off); the model's own setting when empty.
            temperature: randomness of each token, above 0; the model's own setting when empty.
            top_k: draw from the k likeliest tokens (0 is all); the model's own setting when empty.
            top_p: draw from the likeliest tokens that make up this share, 0 to 1; the model's own setting when empty.

        Returns:
            The pictures as PNG files, and details: seeds, tokens, target calls and seconds, or the progress so far.
        """
        async for update in answer_drawing(model, prompt, count, seed, guidance, temperature, top_k, top_p):
            yield update

    begin = gr.on(
        [generate.click, prompt.submit], _begin, None, outputs[1:], queue=False, show_progress="hidden", **private
    )
    run = begin.then(show, wish, outputs, show_progress="hidden", concurrency_id="gpu", concurrency_limit=1, **private)
    run.failure(lambda: _rest(FAILED), None, outputs[1:], queue=False, show_progress="hidden", **private)
    cancel.click(
        lambda: _rest(STOPPED), None, outputs[1:], queue=False, cancels=[run], show_progress="hidden", **private
    )
    dice.click(draw_seed, None, seed, queue=False, show_progress="hidden", **private)
    examples.click(lambda sample: sample[0], examples, prompt, queue=False, show_progress="hidden", **private)

    with gr.Group(visible=False):
        numbers = [gr.Number(label=name) for name in ("Seed", "Guidance", "Temperature", "Top-k", "Top-p")]
        found, details = picture_grid(label="Pictures"), gr.JSON(label="Details")
        endpoint = gr.Button("Generate")
    endpoint.click(
        answer,
        [prompt, count, *numbers],
        [found, details],
        api_name="generate",
        concurrency_id="gpu",
        concurrency_limit=1,
    )


async def show_drawing(model, *values):
    """Draw for the page: yields updates of (gallery, status, generate button, cancel button).

    A mistake in the values becomes a toast that says what to do; pictures and fields stay as they are.
    """
    shown = warned = None
    try:
        wish = Wish.from_fields(model, *values)
        async for news in draw(wish):
            if news.warning and not warned:
                gr.Warning(news.warning, title="Unknown words", duration=12)
                warned = True
            if isinstance(news, Drawn):
                yield (_finished(news, wish), summary(news, wish), *_buttons(running=False))
            elif news.pictures is not shown:
                shown = news.pictures
                yield (_preview(shown, wish), progress(news, wish), gr.skip(), gr.skip())
            else:
                yield gr.skip(), progress(news, wish), gr.skip(), gr.skip()
    except StudioError as error:
        gr.Warning(str(error), title="Please check", duration=10)
        yield (gr.skip(), FAILED, *_buttons(running=False))


async def answer_drawing(model, *values):
    """Draw for a program: yields (pictures, details); a mistake in the values is an error with the same sentence."""
    try:
        wish = Wish(model, *values)
        async for news in draw(wish):
            if isinstance(news, Drawn):
                yield _captioned(news.pictures, wish), _details(news, wish)
            elif news.total:
                yield (
                    _captioned(news.pictures, wish) if news.pictures else gr.skip(),
                    {"drawn": news.drawn, "total": news.total, "seeds": wish.seeds},
                )
    except StudioError as error:
        raise gr.Error(str(error), print_exception=False) from error


def progress(news, wish):
    """The status line of a drawing under way."""
    if not news.total:
        return status_line("Loading the model …", state="running", fraction=0)
    text = f"Drawing {pictures(wish.count)}: {news.drawn} of {news.total} tokens"
    if news.seconds > 0.3:
        rate = (news.drawn - 1) / news.seconds
        text += f", {rate * wish.count:.0f} tokens/s, {_duration((news.total - news.drawn) / max(rate, 1e-6))} left"
    return status_line(text, state="running", fraction=news.drawn / news.total)


def summary(drawn, wish):
    """The status line of a finished drawing."""
    stats = drawn.stats
    seeds = f"{wish.seeds[0]}" if wish.count == 1 else f"{wish.seeds[0]} to {wish.seeds[-1]}"
    return status_line(
        f"{pictures(wish.count).capitalize()} in {_duration(stats.seconds['total'])}.",
        state="done",
        details=[
            ("tokens/s", f"{_rate(stats):.0f}"),
            ("tokens", f"{stats.tokens}"),
            ("target calls", f"{stats.target_calls}"),
            ("seed" if wish.count == 1 else "seeds", seeds),
        ],
    )


def _setting(label, info, own):
    name = label.lower()
    return _field(label, info, name, own.get(name, "model's own"))


def _field(label, info, elem_id, placeholder):
    """A field for a number that may stay empty (Gradio's number field cannot: it turns an empty one into 0)."""
    return gr.Textbox(
        label=label,
        info=info,
        placeholder=placeholder,
        max_lines=1,
        elem_id=elem_id,
        min_width=120,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
    )


def _begin():
    return (QUEUED, *_buttons(running=True))


def _rest(line):
    return (line, *_buttons(running=False))


def _buttons(running):
    return gr.update(visible=not running), gr.update(visible=running)


def _preview(drawn, wish):
    return gr.update(value=_captioned(drawn, wish), columns=columns_for(wish.count), selected_index=None)


def _finished(drawn, wish):
    return gr.update(value=_captioned(drawn.pictures, wish), columns=columns_for(wish.count))


def _captioned(drawn, wish):
    prompt = " ".join(wish.prompt.split())
    return [(picture, f"seed {seed} · {prompt}") for picture, seed in zip(drawn, wish.seeds)]


def _details(drawn, wish):
    stats = drawn.stats
    return {
        "model": str(wish.model),
        "prompt": wish.prompt,
        "seeds": wish.seeds,
        "settings": wish.settings,
        "tokens": stats.tokens,
        "target_calls": stats.target_calls,
        "tokens_per_second": round(_rate(stats), 1),
        "seconds": dict(stats.seconds),
        "warning": drawn.warning,
    }


def _rate(stats):
    return stats.tokens / max(stats.seconds["decode"], 1e-9)


def _duration(seconds):
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
