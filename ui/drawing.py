"""What the app asks a pipeline for, and what comes back while it draws."""

import dataclasses
import math
import secrets
import time
from io import BytesIO

from studio.errors import StudioError
from studio.ui.models import get_pipeline
from studio.ui.preview import Pace, partial_pictures
from studio.ui.worker import follow

MOST_PICTURES = 16
LARGEST_SEED = 2**53 - 1 - MOST_PICTURES  # a browser counts no further


@dataclasses.dataclass(frozen=True)
class Wish:
    """One call of a model. A setting that is `None` is the model's own."""

    model: str
    prompt: str
    count: int = 4
    seed: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not _is_whole(self.count) or not 1 <= self.count <= MOST_PICTURES:
            raise StudioError(f"Choose between 1 and {MOST_PICTURES} pictures.")
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed <= LARGEST_SEED):
            raise StudioError(f"Choose a seed from 0 to {LARGEST_SEED}, or leave it empty to have one drawn.")
        object.__setattr__(self, "count", int(self.count))
        object.__setattr__(self, "seed", draw_seed() if self.seed is None else int(self.seed))

    @classmethod
    def from_fields(cls, model, prompt, count, seed, guidance, temperature, top_k, top_p):
        """The wish that a form describes: numbers as text, empty for the model's own setting."""
        numbers = {
            "seed": _number("seed", seed, int),
            "guidance_scale": _number("guidance", guidance, float),
            "temperature": _number("temperature", temperature, float),
            "top_k": _number("top-k", top_k, int),
            "top_p": _number("top-p", top_p, float),
        }
        return cls(model, prompt, count, **numbers)

    @property
    def seeds(self):
        """The seed of each picture: consecutive numbers."""
        return [self.seed + index for index in range(self.count)]

    @property
    def settings(self):
        """The sampling settings that differ from the model's own, as arguments of the pipeline."""
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if _is_whole(chosen.get("top_k")):
            chosen["top_k"] = int(chosen["top_k"])
        return chosen


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a drawing stands.

    Args:
        drawn, total: tokens per picture; `total` is 0 while the model is being loaded.
        seconds: since the first token.
        pictures: the latest preview, RGBA, or `None`; the same list until there is a newer one.
        warning: what the user should know, or `None`.
    """

    drawn: int = 0
    total: int = 0
    seconds: float = 0.0
    pictures: list | None = None
    warning: str | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A finished drawing: PIL images that carry their settings, and the pipeline's `stats`."""

    pictures: list
    stats: object
    warning: str | None = None


def draw_seed():
    """A new random seed, short enough to read aloud."""
    return secrets.randbelow(2**31)


def draw(wish):
    """Follow a wish: an asynchronous iterator over `Progress` and, at last, `Drawn`.

    Raises:
        StudioError: the model cannot be loaded or refuses the wish.
    """
    return follow(lambda job: _draw(wish, job))


def _draw(wish, job):
    import torch

    from studio.checkpoints.vocabulary import prompt_warning

    job.report(Progress())
    pipe = get_pipeline(wish.model)
    warning = prompt_warning(pipe, wish.prompt)
    total = pipe.transformer.num_tokens
    job.report(Progress(total=total, warning=warning))
    pace, pictures, began = Pace(), None, None

    def after_step(pipe, step, timestep, tensors):
        nonlocal pictures, began
        tokens = tensors["tokens"]
        began = began or time.monotonic()
        if job.stopped:
            pipe._interrupt = True
        elif tokens.shape[1] < total:
            if pace.is_due():
                start = time.monotonic()
                pictures = partial_pictures(pipe, tokens)
                pace.spent(time.monotonic() - start)
            job.report(Progress(tokens.shape[1], total, time.monotonic() - began, pictures, warning))
        return tensors

    output = pipe(
        wish.prompt,
        num_images_per_prompt=wish.count,
        generator=[torch.Generator().manual_seed(seed) for seed in wish.seeds],
        callback_on_step_end=after_step,
        **wish.settings,
    )
    finished = [] if job.stopped else [_with_record(*pair, wish) for pair in zip(output.images, wish.seeds)]
    return Drawn(finished, output.stats, warning)


def _with_record(picture, seed, wish):
    """The picture as a PNG that says how it was made; the app keeps that text chunk when it serves the file."""
    from PIL import Image

    from studio.saving import png_writer

    call = {"model": wish.model, "prompt": wish.prompt, "num_images": wish.count, **wish.settings}
    file = BytesIO()
    png_writer(picture, call, seed)(file)
    return Image.open(file)


def _number(name, text, kind):
    text = (text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise StudioError(f"{name.capitalize()} must be {what}, not {text[:40]!r}; or leave it empty.") from error


def _is_whole(number):
    return isinstance(number, int | float) and math.isfinite(number) and number == int(number)
