"""One call of a pipeline as the app makes it, and what comes back while it samples."""

import dataclasses
import itertools
import time
from io import BytesIO

from studio import decoding_named
from studio.errors import StudioError
from studio.ui.jobs.draft_trace import DraftTrace, fates_of, watched
from studio.ui.render.preview import Pace, Sketch, partial_images
from studio.ui.server.models import get_pipeline
from studio.ui.server.worker import BatchSpec, follow
from studio.ui.server.zerogpu import on_gpu


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a sampling stands.

    Args:
        sampled, total: tokens per image; `total` is 0 while the model is being loaded.
        seconds: since the first token.
        images: the latest preview, RGBA, or `None`; the same list until there is a newer one.
        fates: of the first image's tokens, where drafts are made; the same object until there is a newer one.
        warning: what the user should know, or `None`.
        ahead: how many turns at most come before its own while it waits; else `None`.
    """

    sampled: int = 0
    total: int = 0
    seconds: float = 0.0
    images: list | None = None
    fates: DraftTrace | None = None
    warning: str | None = None
    ahead: int | None = None


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A finished sampling: PIL images that carry their settings; `fates` and `warning` as in `Progress`.

    `stats` are those of the pipeline, with the tokens of these images alone; `together` says how many images the
    call drew, those of other people included.
    """

    images: list
    stats: object
    fates: DraftTrace | None = None
    warning: str | None = None
    together: int = 1


class Call:
    """One call of a pipeline, with drafts watched where its decoding makes any.

    Several wishes of one `manner` make one call.

    Raises:
        StudioError: the pipeline knows no such settings.
    """

    def __init__(self, pipe, *wishes):
        self.pipe, self.wishes, self.total = pipe, wishes, pipe.transformer.num_tokens
        self.wish = wish = wishes[0]
        pipe.check_arguments(wish.settings)
        self.decoding = decoding_named(wish.decoding).settings(**wish.options)
        self.decoding, self.rounds = watched(self.decoding, [rows.start for rows in self.rows])

    @property
    def warning(self):
        """What the user should know, or `None`."""
        from studio.checkpoints.vocabulary import prompt_warning

        notes = prompt_warning(self.pipe, self.wish.prompt), self.pipe.validation_warning(self.decoding)
        return " ".join(filter(None, notes)) or None

    def __call__(self, on_step):
        """Sample; `on_step` sees a `Sketch` after each step, and stops the sampling with True."""
        import torch

        shown = [name for name in ("tokens", "positions") if name in self.pipe._callback_tensor_inputs]
        prompts = [wish.prompt for wish in self.wishes for _ in wish.seeds]
        seeds = [seed for wish in self.wishes for seed in wish.seeds]
        known = torch.zeros(len(seeds), self.total, dtype=torch.bool)

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
            prompts,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            decoding=self.decoding,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=shown,
            **self.wish.settings,
        )

    def check(self):
        """Raises the `StudioError` that a call would raise for its wish, before it samples."""
        self.pipe.check_call(self.wish.prompt, decoding=self.decoding, **self.wish.settings)

    @property
    def rows(self):
        """Which images of the call belong to each wish, as slices."""
        ends = list(itertools.accumulate(wish.count for wish in self.wishes))
        return [slice(end - wish.count, end) for end, wish in zip(ends, self.wishes)]

    def fates(self, sketch, number=0):
        """How the tokens of the first image of a wish came about; `None` where no single drafts are seen."""
        if self.rounds is None or (not self.rounds[number] and sketch.sampled > 1):
            return None
        return fates_of(self.rounds[number], sketch.tokens[self.rows[number].start].tolist(), self.total)


def as_files(images, wish):
    """Finished images of a wish as PNGs that say how they were made; the app serves that text too."""
    from PIL import Image

    from studio.saving import png_writer

    originals = []
    for image, seed in zip(images, wish.seeds):
        file = BytesIO()
        png_writer(image, wish.record, seed)(file)
        originals.append(Image.open(file))
    return originals


def sample(wish):
    """Follow a wish: an asynchronous iterator over `Progress` and, at last, `Sampled`.

    Raises:
        StudioError: the model cannot be loaded or refuses the wish, or too many wait already.
    """
    share = BatchSpec(wish.manner, wish.count, wish, sample_together, lambda ahead: Progress(ahead=ahead))
    return follow(lambda job: _sample(wish, job), share)


@on_gpu(seconds=60)
def _sample(wish, job):
    [sampled] = sample_together([wish], [job])
    if isinstance(sampled, Exception):
        raise sampled
    return sampled


def sample_together(wishes, jobs):
    """Sample wishes of one `manner` in one call of their pipeline, each for its own job.

    A wish that the pipeline refuses, or that nobody waits for any more, keeps no other from being sampled.

    Returns:
        For each a `Sampled`, with no images where it was stopped, or the `StudioError` that refuses it.
    """
    for job in jobs:
        job.report(Progress())
    pipe = get_pipeline(wishes[0].model, jobs[0].device)
    results, samples = [None] * len(wishes), []
    for number, (wish, job) in enumerate(zip(wishes, jobs)):
        try:
            call = Call(pipe, wish)
            call.check()
            samples.append(_Sampling(number, job, call))
        except StudioError as error:
            results[number] = error
    if samples:
        for sampling, sampled in zip(samples, _sampled(pipe, samples)):
            results[sampling.number] = sampled
    return results


class _Sampling:
    """The part of one wish in a call.

    Args:
        number: its place among the wishes.
        job: who waits for it.
        call: the call that would sample it alone.
    """

    def __init__(self, number, job, call):
        self.number, self.job, self.wish, self.warning = number, job, call.wish, call.warning
        self.latest = Progress(total=call.total, warning=self.warning)
        job.report(self.latest)

    def update(self, **changes):
        self.latest = dataclasses.replace(self.latest, **changes)
        self.job.report(self.latest)


def _sampled(pipe, samples):
    """The `Sampled` of each sampling, after one call for all of them."""
    call = Call(pipe, *(sampling.wish for sampling in samples))
    pace, began = Pace(), None

    def is_over():
        return all(sampling.job.stopped for sampling in samples)

    def on_step(sketch):
        nonlocal began
        began = began or time.monotonic()
        if not is_over():
            previews = {}
            if sketch.sampled < call.total and pace.is_due():
                start = time.monotonic()
                images = partial_images(pipe, sketch)
                previews = [
                    {"images": images[rows], "fates": call.fates(sketch, place)} for place, rows in enumerate(call.rows)
                ]
                pace.spent(time.monotonic() - start)
            seconds = time.monotonic() - began
            for sampling, preview in zip(samples, previews or [{}] * len(samples)):
                sampling.update(sampled=sketch.sampled, seconds=seconds, **preview)
        return is_over()

    output = call(on_step)
    sketch, together = Sketch(output.tokens), len(output.tokens)
    results = []
    for place, (sampling, rows) in enumerate(zip(samples, call.rows)):
        stats = dataclasses.replace(output.stats, tokens=output.stats.tokens * sampling.wish.count // together)
        images = [] if sampling.job.stopped else as_files(output.images[rows], sampling.wish)
        results.append(Sampled(images, stats, call.fates(sketch, place), sampling.warning, together))
    return results
