"""One call of a pipeline as the app makes it, and what comes back while it draws."""

import dataclasses
import time
from io import BytesIO

from studio import decoding_named
from studio.ui.lending import on_gpu
from studio.ui.models import get_pipeline
from studio.ui.preview import Pace, partial_pictures
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
    """One call of a pipeline, with drafts watched where its decoding makes any."""

    def __init__(self, pipe, wish):
        self.pipe, self.wish, self.total = pipe, wish, pipe.transformer.num_tokens
        self.decoding = decoding_named(wish.decoding).settings(**wish.options)
        self.watched = None
        if hasattr(self.decoding, "drafts"):
            self.watched = WatchedDrafts(self.decoding.drafts)
            self.decoding = dataclasses.replace(self.decoding, drafts=self.watched)

    def __call__(self, on_tokens):
        """Draw; `on_tokens(tokens)` sees the tokens (B, n) so far after each step, and stops the drawing with True."""
        import torch

        def after_step(pipe, step, timestep, tensors):
            if on_tokens(tensors["tokens"]):
                pipe._interrupt = True
            return tensors

        return self.pipe(
            self.wish.prompt,
            num_images_per_prompt=self.wish.count,
            generator=[torch.Generator().manual_seed(seed) for seed in self.wish.seeds],
            decoding=self.decoding,
            callback_on_step_end=after_step,
            **self.wish.settings,
        )

    def fates(self, tokens):
        """How the first picture's tokens (B, n) came about; `None` where no drafts are made."""
        return fates_of(self.watched.rounds, tokens[0].tolist(), self.total) if self.watched else None

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
    from studio.checkpoints.vocabulary import prompt_warning

    job.report(Progress())
    pipe = get_pipeline(wish.model)
    call, warning = Call(pipe, wish), prompt_warning(pipe, wish.prompt)
    job.report(Progress(total=call.total, warning=warning))
    pace, pictures, fates, began = Pace(), None, None, None

    def on_tokens(tokens):
        nonlocal pictures, fates, began
        began = began or time.monotonic()
        if not job.stopped:
            if tokens.shape[1] < call.total and pace.is_due():
                start = time.monotonic()
                pictures, fates = partial_pictures(pipe, tokens), call.fates(tokens)
                pace.spent(time.monotonic() - start)
            job.report(Progress(tokens.shape[1], call.total, time.monotonic() - began, pictures, fates, warning))
        return job.stopped

    output = call(on_tokens)
    if job.stopped:
        return Drawn([], output.stats)
    return Drawn(call.finished(output), output.stats, call.fates(output.tokens), warning)
