"""What is shown of a request to sample: its status line, its images with their captions, and its details."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL.Image import Image

from studio import decoding_named
from studio.ui.jobs.draft_trace import DraftTrace
from studio.ui.jobs.generate_job import Progress, Sampled
from studio.ui.jobs.request import GenerateRequest
from studio.ui.jobs.side_by_side import Run, SideBySide
from studio.ui.render.render_side_by_side import side_by_side_verdict
from studio.ui.render.token_grid import token_grid
from studio.ui.server.png_metadata import link_to
from studio.ui.tabs.components import columns_for, duration, images, named_png, status_line

LOADING = status_line("Loading the model …", state="running", fraction=0)


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


def summary(sampled: Sampled, request: GenerateRequest, default: str) -> str:
    """The status line of a finished request; `default` is the app's own model."""
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
        link=("Link to these settings", link_to(request, default)),
    )


def side_by_side_status(news: SideBySide, request: GenerateRequest) -> str:
    """The status line of two decodings side by side."""
    if news.finished:
        return status_line(side_by_side_verdict(news), state="done", details=[("seed", f"{request.seed}")])
    fraction = sum(run.sampled for run in news.runs) / sum(run.total for run in news.runs)
    far = ", ".join(f"{run.title} {run.sampled}" for run in news.runs)
    text = f"Sampling in turns: {far} of {news.runs[0].total} tokens"
    return status_line(text, state="running", fraction=fraction)


def gallery(sampled: Sequence[Any], request: GenerateRequest) -> Any:
    """An update of the gallery: images with their captions."""
    return gr.update(value=captioned(sampled, request), columns=columns_for(request.count), selected_index=None)


def sides(news: SideBySide, request: GenerateRequest) -> Any:
    """An update of the gallery: the images of two decodings."""
    found = [(_image_or_file(run, request), f"{run.title} · seed {request.seed}") for run in news.runs]
    return gr.update(value=found, columns=2, selected_index=None)


def _image_or_file(run: Run, request: GenerateRequest) -> Any:
    """A preview, or the finished image as a file whose name says what it is."""
    return named_png(run.image, request.subject, request.seeds[0], run.title) if run.image and run.stats else run.image


def draft_tokens(trace: DraftTrace | None) -> str:
    """The grid of the first image's tokens; empty where a decoding has no drafts."""
    return token_grid(trace, "Tokens of the first image") if trace else ""


def image_files(sampled: Sequence[Image], request: GenerateRequest) -> list[str]:
    """Finished images as files whose names say what they are."""
    return [named_png(image, request.subject, seed) for image, seed in zip(sampled, request.seeds)]


def captioned(sampled: Sequence[Any], request: GenerateRequest) -> list[tuple[Any, str]]:
    """Images with their captions: seed and prompt."""
    prompt = " ".join(request.subject.split())
    return [(image, f"seed {seed} · {prompt}") for image, seed in zip(sampled, request.seeds)]


def details(sampled: Sampled, request: GenerateRequest) -> dict[str, Any]:
    """What the endpoint returns of a finished request: settings, tokens, calls and seconds."""
    stats = sampled.stats
    return {
        "model": str(request.model),
        "prompt": request.prompt,
        "class_label": request.class_label,
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
