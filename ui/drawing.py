"""One call of a pipeline as the app makes it, and what comes back while it draws."""

import dataclasses
import time
from io import BytesIO

from studio import decoding_named
from studio.ui.lending import on_gpu
from studio.ui.models import get_pipeline
from studio.ui.preview import Pace, Sketch, partial_pictures
from studio.ui.watching import TokenFates, WatchedDrafts, fates_of
from studio.ui.worker import follow


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a drawing stands.

    Args:
        drawn, total: tokens per picture; `total` is 0 while the model is being loaded.
        seconds: since the first token.
        pictures: the latest preview, RGBA, or `None`; the same list until there is a newer one.
        fates: of the first picture's tokens, where drafts are made; the same object until there is a newer one.
        warning: what the user should know, or `None`.
    """

    drawn: int = 0
    total: int = 0
    seconds: float = 0.0
    pictures: list | None = None
    fates: TokenFates | None = None
    warning: str | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A finished drawing: PIL images that carry their settings, `stats` of the pipeline; the rest as in `Progress`."""

    pictures: list
    stats: object
    fates: TokenFates | None = None
    warning: str | None = None


class Call:
    """One call of a pipeline, with drafts watched where its decoding makes any.

    Raises:
        StudioError: the pipeline knows no such settings.
    """

    def __init__(self, pipe, wish):
        self.pipe, self.wish, self.total = pipe, wish, pipe.transformer.num_tokens
        pipe.check_arguments(wish.settings)
        self.decoding = decoding_named(wish.decoding).settings(**wish.options)
        self.watched = None
        if hasattr(self.decoding, "drafts"):
            self.watched = WatchedDrafts(self.decoding.drafts)
            self.decoding = dataclasses.replace(self.decoding, drafts=self.watched)

    @property
    def warning(self):
        """What the user should know, or `None`."""
        from studio.checkpoints.vocabulary import prompt_warning

        notes = prompt_warning(self.pipe, self.wish.prompt), self.pipe.caution(self.decoding)
        return " ".join(filter(None, notes)) or None

    def __call__(self, on_step):
        """Draw; `on_step` sees a `Sketch` after each step, and stops the drawing with True."""
        import torch

        watched = [name for name in ("tokens", "positions") if name in self.pipe._callback_tensor_inputs]
        known = torch.zeros(self.wish.count, self.total, dtype=torch.bool)

        def after_step(pipe, step, timestep, tensors):
            tokens = tensors["tokens"]
            if "positions" in tensors:
                known.scatter_(1, tensors["positions"].cpu(), True)
                sketch = Sketch(tokens, known)
            else:
                sketch = Sketch(tokens, (tokens >= 0).any(dim=2) if tokens.ndim == 3 else None)
            if on_step(sketch):
                pipe._interrupt = True
            return tensors

        return self.pipe(
            self.wish.prompt,
            num_images_per_prompt=self.wish.count,
            generator=[torch.Generator().manual_seed(seed) for seed in self.wish.seeds],
            decoding=self.decoding,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=watched,
            **self.wish.settings,
        )

    def fates(self, sketch):
        """How the first picture's tokens came about; `None` where no single drafts are seen."""
        return fates_of(self.watched.rounds, sketch.tokens[0].tolist(), self.total) if self.watched else None

    def finished(self, output):
        """The pictures of a whole drawing, as PNGs that say how they were made; the app serves that text too."""
        from PIL import Image

        from studio.saving import png_writer

        pictures = []
        for picture, seed in zip(output.images, self.wish.seeds):
            file = BytesIO()
            png_writer(picture, self.wish.record, seed)(file)
            pictures.append(Image.open(file))
        return pictures


def draw(wish):
    """Follow a wish: an asynchronous iterator over `Progress` and, at last, `Drawn`.

    Raises:
        StudioError: the model cannot be loaded or refuses the wish.
    """
    return follow(lambda job: _draw(wish, job))


@on_gpu(seconds=60)
def _draw(wish, job):
    job.report(Progress())
    pipe = get_pipeline(wish.model)
    call = Call(pipe, wish)
    warning = call.warning
    job.report(Progress(total=call.total, warning=warning))
    pace, pictures, fates, began = Pace(), None, None, None

    def on_step(sketch):
        nonlocal pictures, fates, began
        began = began or time.monotonic()
        if not job.stopped:
            if sketch.drawn < call.total and pace.is_due():
                start = time.monotonic()
                pictures, fates = partial_pictures(pipe, sketch), call.fates(sketch)
                pace.spent(time.monotonic() - start)
            job.report(Progress(sketch.drawn, call.total, time.monotonic() - began, pictures, fates, warning))
        return job.stopped

    output = call(on_step)
    if job.stopped:
        return Drawn([], output.stats)
    return Drawn(call.finished(output), output.stats, call.fates(Sketch(output.tokens)), warning)
