"""The work behind the Edit tab: a part of an image redrawn, an image expanded, or variations of one."""

import dataclasses
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from studio import decoding_named
from studio.checks import as_integer, check_integer, check_number, set_fields, shown
from studio.errors import StudioError, check_stopped
from studio.ui.jobs.generate_job import as_files, subject_of
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server import metrics
from studio.ui.server.limits import check_model, limits
from studio.ui.server.models import fitting_decodings, get_pipeline
from studio.ui.server.worker import Job, follow
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    from PIL.Image import Image

_PAUSE = 1.0  # seconds; the browser sends the images of its editor again with every report
SIDES = ("left", "top", "right", "bottom")
_NOTHING = "Nothing is to be redrawn: paint over a part, expand a side, or lower the strength for a variation."


@dataclasses.dataclass(frozen=True)
class RedrawRequest:
    """An image and what to redraw of it.

    Args:
        image: in mode RGB.
        mask: white where to redraw; `None` for variations and for expanding.
        sampling: model, prompt, number of images, seed, guidance and temperature.
        strength: share of the masked cells that is redrawn, above 0 and at most 1.
        expand: pixels to add by side.
        padding: redraw a square around the mask with this margin; `None`: one of the shorter side of the image.

    Raises:
        StudioError: a value that cannot be used, or nothing to redraw.
    """

    image: "Image"
    mask: "Image | None"
    sampling: GenerateRequest
    strength: float = 1.0
    expand: dict[str, int] = dataclasses.field(default_factory=dict)
    padding: int | None = None

    def __post_init__(self) -> None:
        check_number("The strength", self.strength, 0, 1, above=True)
        if not isinstance(self.expand, dict) or not set(self.expand) <= set(SIDES):
            raise StudioError(
                f"Expand by sides, as in {{'left': 64}}, out of {', '.join(SIDES)}: {shown(self.expand)}."
            )
        most = max(self.image.size) * 4
        expand = {
            side: check_integer(f"The pixels to add at the {side}", as_integer(pixels), 0, most)
            for side, pixels in self.expand.items()
            if pixels not in (None, "")
        }
        set_fields(self, expand={side: pixels for side, pixels in expand.items() if pixels})
        if self.padding is not None:
            set_fields(self, padding=check_integer("The padding", as_integer(self.padding), 0, most))
        if self.mask is None and not self.expand and self.strength == 1:
            raise StudioError(_NOTHING)
        if self.mask is None and not self.expand and self.padding is not None:
            raise StudioError("The padding belongs to a mask: mark where to redraw, or leave the padding out.")

    @property
    def settings(self) -> dict[str, Any]:
        """What the call of the pipeline gets beside the image and what `sampling` has."""
        own = {"strength": self.strength, "expand": self.expand or None, "padding_mask_crop": self.padding}
        return {**self.sampling.settings, **{name: value for name, value in own.items() if value is not None}}


def redraw_request(
    image: "Image", mask: "Image | None", model: Any, prompt: Any, count: Any = 1, seed: Any = None,
    guidance: Any = None, strength: Any = 1.0, expand: Any = None, padding: Any = None, class_label: Any = None,
) -> RedrawRequest:  # fmt: skip
    """A request from the values of fields; empty ones are left to the model.

    Raises:
        StudioError: a value that cannot be used.
    """
    decoding = fitting_decodings(check_model(model).strip())[0]
    sampling = GenerateRequest(model.strip(), prompt, count, seed, guidance, decoding=decoding, class_label=class_label)
    return RedrawRequest(image, mask, sampling, strength, expand or {}, padding)


@dataclasses.dataclass(frozen=True)
class Redrawing:
    """A request under way: how many steps are done; 0 while the model is being loaded."""

    steps: int = 0


@dataclasses.dataclass(frozen=True)
class Redrawn:
    """A finished request: the original, expanded with white, and the images with their settings as metadata.

    `approximate` says that the model did not know of what stands behind the redrawn part.
    """

    before: "Image"
    images: "list[Image]"
    stats: Any
    approximate: bool
    warning: str | None = None


def redraw(request: RedrawRequest) -> AsyncIterator[Redrawing | Redrawn]:
    """Follow a request.

    Yields:
        `Redrawing` and, at last, a `Redrawn`.

    Raises:
        StudioError: the model cannot be loaded or refuses the request, or the queue is full.
    """
    request.sampling.check_subject()
    return follow(lambda job: _redraw(request, job), images=request.sampling.count)


@on_gpu(seconds=60)
def _redraw(request: RedrawRequest, job: Job) -> Redrawn:
    import torch

    from studio.checkpoints.vocabulary import prompt_warning

    job.report(Redrawing())
    sampling = request.sampling
    pipe = get_pipeline(sampling.model, job.device)
    decoding = decoding_named(sampling.decoding).settings(**sampling.options)
    steps, reported = 0, time.monotonic()

    def after_step(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps, reported
        steps += 1
        if time.monotonic() - reported > _PAUSE:
            reported = time.monotonic()
            job.report(Redrawing(steps))
        check_stopped(lambda: job.stopped)
        return {}

    name, subject = subject_of(pipe, sampling)
    output = pipe(
        **{name: subject},
        image=request.image,
        mask_image=request.mask,
        num_images_per_prompt=sampling.count,
        generator=[torch.Generator().manual_seed(seed) for seed in sampling.seeds],
        decoding=decoding,
        callback_on_step_end=after_step,
        **request.settings,
    )
    edits = {name: value for name, value in request.settings.items() if name not in sampling.settings}
    record = {**sampling.record, "edit": {**edits, "mask": request.mask is not None}}
    images = [] if job.stopped else as_files(output.images, sampling, record)
    if images:
        metrics.count_images(sampling.model, len(images), output.stats.tokens)
    metrics.count_seconds(output.stats.seconds)
    warning = prompt_warning(pipe, sampling.prompt)
    return Redrawn(_expanded(request), images, output.stats, output.approximate, warning)


def _expanded(request: RedrawRequest) -> "Image":
    """The original on white, as large as the results."""
    from PIL import Image

    left, top, right, bottom = (request.expand.get(side, 0) for side in SIDES)
    width, height = request.image.size
    canvas = Image.new("RGB", (left + width + right, top + height + bottom), "white")
    canvas.paste(request.image, (left, top))
    return canvas


def box_mask(box: Any, size: tuple[int, int]) -> "Image | None":
    """A mask that is white in a box [x, y, width, height] of an image of this size; `None` for no box.

    Raises:
        StudioError: no such box.
    """
    from PIL import Image

    if box in (None, [], ""):
        return None
    if not isinstance(box, list) or len(box) != 4:
        raise StudioError(f"A box is [x, y, width, height] in pixels, not {shown(box)}.")
    left, top, width, height = (
        check_integer("Each number of the box", as_integer(number), 0, max(size)) for number in box
    )
    mask = Image.new("L", size)
    mask.paste(255, (left, top, min(left + width, size[0]), min(top + height, size[1])))
    return mask


def check_size(image: "Image") -> "Image":
    """Check an image against the limits of this process."""
    from studio.images import check_pixels, check_shape

    check_pixels("The image", *image.size, limits().pixels)
    check_shape("The image", *image.size)
    return image
