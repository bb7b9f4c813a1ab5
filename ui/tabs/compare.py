"""The Compare tab: one prompt sampled by several models and decodings, side by side."""

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from studio.ui.jobs.compare_job import (
    MAX_IMAGES_PER_SIDE,
    MAX_SIDES,
    CompareRequest,
    Comparison,
    Side,
    compare,
    offered_sides,
)
from studio.ui.jobs.request import number_of, sample_seed
from studio.ui.render.render_sides import comparison_verdict, render_sides
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.limits import limits
from studio.ui.server.models import offered_pipelines
from studio.ui.server.send_to import SEND_TO, SendTo, build_send_to
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import count_slider, duration, image_grid, named_png, status_line
from studio.ui.tabs.fields import number_field
from studio.ui.tabs.history import History

EXAMPLES = ["a red apple, 3d style, on a blue background", "a fox, flat style", "a rocket"]
IDLE = status_line("Write a prompt and choose at least two models or decodings.")
_MOST_COLUMNS = 3


def build_tab(model: str, history: History) -> tuple[gr.Textbox, SendTo]:
    """Build the tab inside the current Blocks; models are loaded by the first comparison.

    Args:
        model: offered first.
        history: takes what is sampled.

    Returns:
        The field of the prompt, and the buttons that send images to other tabs.
    """
    offered = offered_sides(offered_pipelines(model))
    with gr.Row(elem_id="studio-compare", elem_classes="studio-stage"):
        with gr.Column(elem_classes="area-ask"):
            prompt = gr.Textbox(
                label="Prompt",
                info="The same prompt and seeds for all.",
                placeholder=EXAMPLES[0],
                lines=2,
                max_lines=6,
                elem_id="compare-prompt",
            )
            with gr.Row(elem_classes="studio-actions"):
                start = gr.Button("Compare", variant="primary", elem_id="compare-start", scale=2)
                cancel = gr.Button("Cancel", variant="stop", elem_id="compare-cancel", visible=False, scale=2)
            examples = gr.Dataset(
                components=[prompt],
                samples=[[text] for text in EXAMPLES],
                label="Try",
                elem_id="compare-examples",
                elem_classes="studio-examples",
                type="values",
            )
        with gr.Column(elem_classes="area-show"):
            gallery = image_grid(label="Images", show_label=False, columns=2, elem_id="compare-images", captioned=True)
            status = gr.HTML(IDLE, elem_id="compare-status", elem_classes="studio-line")
            send_to = build_send_to(gallery, SEND_TO, [start.click, prompt.submit], prefix="compare-")
            cards = gr.HTML("", elem_id="sides", elem_classes="studio-line")
        with gr.Column(elem_classes="area-tune"):
            sides = gr.Dropdown(
                offered,
                value=[side for _, side in offered[:2]],
                multiselect=True,
                max_choices=MAX_SIDES,
                allow_custom_value=True,
                label="Models and decodings",
                info="Choose from the list, or write MODEL: lantern delta=0.3 and press Enter.",
                elem_id="compare-sides",
            )
            most = min(MAX_IMAGES_PER_SIDE, limits().images)
            count = count_slider(most, value=1, label="Images of each", elem_id="compare-count")
            with gr.Row(elem_classes="studio-seed"):
                seed = number_field("Seed", "The same for all.", "compare-seed", "a new one each time")
                dice = gr.Button("Roll", elem_id="compare-dice", size="sm", scale=0, min_width=0)

    inputs, outputs = [history.past, prompt, sides, count, seed], [gallery, cards, status, *history.outputs]
    connect_actions(
        [([start.click, prompt.submit], history.recorded(show_comparison), inputs, outputs)],
        status,
        starts=[start],
        cancel=cancel,
    )
    dice.click(sample_seed, None, seed, queue=False, **PRIVATE)
    examples.click(lambda sample: sample[0], examples, prompt, queue=False, **PRIVATE)
    _endpoint(prompt, sides, count)
    return prompt, send_to


def _endpoint(prompt: gr.Textbox, sides: gr.Dropdown, count: gr.Slider) -> None:
    """The endpoint for programs."""

    async def compare(prompt, sides, count=1, seed=None):
        """Sample one prompt with several models and decodings; streams each when it is done.

        Args:
            prompt: what to sample, up to 2,000 characters, such as "a red apple".
            sides: a list of 2 to 6 of "MODEL: DECODING", with options as in "emoji-ar: lantern delta=0.3".
            count: how many images of each, 1 to 4.
            seed: seed of the first image of each, the next use seed + 1 and so on; sampled when empty.

        Returns:
            The images as PNG files, and details of each side: seconds, calls of the model, tokens per call, accepted
            drafts of the first image, and the predictions of the judge where the model is bundled; "unscored" is the
            reason where there is no score.
        """
        async for update in answer_comparison(prompt, sides, count, seed):
            yield update

    with gr.Group(visible=False):
        seed = gr.Number(label="Seed")
        found, details = image_grid(label="Images"), gr.JSON(label="Details")
        endpoint = gr.Button("Compare")
    endpoint.click(compare, [prompt, sides, count, seed], [found, details], api_name="compare", **ON_THE_MODEL)


async def show_comparison(prompt: Any, sides: Any, count: Any, seed: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Compare for the page: yields updates of (gallery, cards, status).

    An error becomes a toast that says what to do; images and fields stay as they are.

    Args:
        prompt, sides, count: as of `CompareRequest`.
        seed: as text, which may be empty.
    """
    done = warned = 0
    try:
        request = CompareRequest(prompt, sides, count, number_of("seed", seed, int))
        async for found in compare(request):
            if found.warning and not warned:
                toast(found.warning, title="Please note", duration=12)
                warned = True
            ended = sum(bool(side.stats) for side in found.sides)
            gallery = _gallery(found) if ended > done else gr.skip()
            done = ended
            yield gallery, gr.skip() if found.loading else render_sides(found), _status(found)
    except Exception as error:
        toast(sentence_of(error))
        yield gr.skip(), gr.skip(), FAILED


async def answer_comparison(
    prompt: Any, sides: Any, count: Any, seed: Any
) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """Compare for a program: yields (images, details).

    Args:
        prompt, sides, count, seed: as of `CompareRequest`.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    async for found in compare(CompareRequest(prompt, sides, count, seed)):
        done = [side for side in found.sides if side.stats]
        yield _captioned(done) if done else gr.skip(), {"sides": [_details(side) for side in found.sides]}


def _gallery(found: Comparison) -> Any:
    """All sides in one row, or a row for each side where it has several images."""
    count = found.sides[0].request.count
    columns = min(len(found.sides), _MOST_COLUMNS) if count == 1 else count
    return gr.update(value=_captioned(found.sides), columns=columns, selected_index=None)


def _captioned(sides: Sequence[Side]) -> list[tuple[Any, str]]:
    return [
        (named_png(image, side.request.prompt, seed, side.title), f"{side.title} · seed {seed}")
        for side in sides
        for image, seed in zip(side.images, side.request.seeds)
    ]


def _status(found: Comparison) -> str:
    if found.loading:
        return status_line(f"Loading and warming up {found.loading} …", state="running", fraction=0)
    if found.finished:
        return status_line(
            comparison_verdict(found), state="done", details=[("seed", f"{found.sides[0].request.seed}")]
        )
    done = sum(bool(side.stats) for side in found.sides)
    side = found.sides[done if found.running is None else found.running]
    fraction = side.sampled / side.total if side.total else 0
    text = f"Sampling {done + 1} of {len(found.sides)}, {side.title}: {side.sampled} of {side.total} tokens"
    if fraction > 0 and found.seconds > 0.3:
        text += f", {duration(found.seconds * (1 - fraction) / fraction)} left"
    return status_line(text, state="running", fraction=(done + fraction) / len(found.sides))


def _details(side: Side) -> dict[str, Any]:
    details = {
        "model": side.request.model,
        "decoding": side.request.how,
        "seeds": side.request.seeds,
        "sampled": side.sampled,
    }
    if not side.stats:
        return details
    stats = side.stats
    cost = {
        "seconds": dict(stats.seconds),
        "target_calls": stats.target_calls,
        "tokens": stats.tokens,
        "mean_accepted_length": stats.mean_accepted_length,
        "accepted_tokens": len(side.trace.accepted) if side.trace else None,
        "acceptance": stats.acceptance,
    }
    judged = {
        "judge": [dataclasses.asdict(prediction) for prediction in side.judge_predictions] or None,
        "unscored": side.unscored,
    }
    return {**details, **cost, **judged}
