"""`POST /v1/images/edits`: OpenAI's form for redrawing a part of an image, with the settings of token-based models.

OpenAI's masks are transparent where to redraw; those of diffusers, the Python API and the command line are white there.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from PIL.Image import Image

from studio.errors import StudioError
from studio.images import read_alpha, read_image
from studio.ui.api.answers import ImageAnswers, refuse, sampling_of, size_of
from studio.ui.api.asking import asking, begun, last_of, streamed
from studio.ui.api.errors import ApiError, ApiRoute
from studio.ui.api.schemas import EditForm
from studio.ui.jobs.edit_job import Redrawing, Redrawn, RedrawRequest, redraw
from studio.ui.server.limits import limits

_KIND = "image_edit"


def edits_router(folder: Path | None) -> APIRouter:
    """The endpoint.

    Args:
        folder: as of `ImageAnswers`.
    """
    router = APIRouter(route_class=ApiRoute, tags=["images"])

    @router.post("/v1/images/edits", summary="Redraw a part of an image", dependencies=[Depends(_check_form)])
    async def edit(
        body: Annotated[EditForm, Form(media_type="multipart/form-data")],  # type: ignore[valid-type]  # made at run time
        request: Request,
    ) -> Any:
        await _check_once(request)
        answers = ImageAnswers(body, folder)
        asked = await _asked(body)
        sampling = asked.sampling
        noted = {"model": sampling.model, "images": sampling.count, "decoding": sampling.decoding}
        items = redraw(asked)
        left = await asking(request, **noted, user=body.user)
        if body.stream:
            first = await begun(items, lambda item: isinstance(item, Redrawn) or item.steps, left)
            return streamed(_events(answers, sampling.seeds, first, items), items, left)
        result = await last_of(items, left)
        assert isinstance(result, Redrawn)
        return {**await answers.whole(result.images, sampling.seeds, request), "studio": _own(result)}

    return router


async def _check_form(request: Request) -> None:
    """Check that a form was sent: nothing would be found in any other body."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError("This endpoint takes a form: send multipart/form-data.", code="invalid_form")


async def _check_once(request: Request) -> None:
    """Check that each parameter is given once; of several, only the last would count."""
    names = [name for name, _ in (await request.form()).multi_items()]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            raise _wrong(name.removesuffix("[]"), "give it once")


async def _asked(body: Any) -> RedrawRequest:
    """The request behind a form.

    Raises:
        StudioError: a parameter that cannot be served.
    """
    if body.partial_images:
        refuse("partial_images", "a stream of edits has finished images only")
    files = [*filter(None, [body.image]), *(body.images or ())]
    if not files:
        raise ApiError("Missing required parameter: 'image'.", param="image", code="missing_required_parameter")
    if len(files) > 1:
        raise _wrong("image", "give it once")
    strength, sampling = 1.0 if body.strength is None else body.strength, sampling_of(body)
    image, alpha = await _read(files[0], "image", read_image), await _read(files[0], "image", read_alpha)
    assert image is not None
    if body.size not in (None, "auto", size_of(image)):
        refuse("size", f"results have the size of the image, {size_of(image)}: leave it out")
    if body.mask is not None:
        alpha = await _read(body.mask, "mask", read_alpha)
        if alpha is not None and alpha.size != image.size:
            raise _wrong("mask", f"it has {size_of(alpha)} pixels and the image {size_of(image)}; they must be equal")
    return RedrawRequest(
        image, _white(alpha, body.mask is not None, strength), sampling, strength, {}, body.padding_mask_crop
    )


def _white(alpha: Image | None, is_mask: bool, strength: float) -> Image | None:
    """A mask that is white where an image or OpenAI's mask is fully transparent; `None` for a variation.

    Args:
        alpha: opacity, in mode L; `None` for a file without transparency.
        is_mask: whether it is that of a mask, and not of the image to edit.
        strength: share of the cells to redraw.

    Raises:
        ApiError: nothing is transparent, or everything is and nothing would stay.
    """
    white = alpha and alpha.point(lambda opacity: 255 * (opacity == 0))
    name = "mask" if is_mask else "image"
    if white is None or white.getbbox() is None:
        if not is_mask and strength < 1:
            return None
        more = ", white is not" if is_mask else ", or give such a mask, or a strength below 1 for a variation"
        raise _wrong(name, f"no pixel is fully transparent: make it so where to redraw{more}")
    if white.getextrema() == (255, 255) and strength == 1:
        raise _wrong(name, "it is transparent everywhere, so nothing would stay: keep a part opaque")
    return white


async def _read(file: UploadFile, name: str, read: Callable[..., Any]) -> Any:
    """What `read` makes of a file.

    Raises:
        ApiError: an image that cannot be read, or that is too large.
    """
    await file.seek(0)
    data = await file.read()
    try:
        return await asyncio.to_thread(read, data, f"The {name}", limits().pixels)
    except StudioError as error:
        raise ApiError(str(error), param=name, code="invalid_image_file") from error


async def _events(
    answers: ImageAnswers, seeds: list[int], first: Redrawing | Redrawn, items: AsyncIterator[Redrawing | Redrawn]
) -> AsyncGenerator[str]:
    """The events of the finished images."""
    item = first
    while not isinstance(item, Redrawn):
        item = await anext(items)
    for each in answers.completed(_KIND, item.images, seeds, studio=_own(item)):
        yield await each


def _own(result: Redrawn) -> dict[str, Any]:
    """What the edit cost, and whether the model did not know of what stands behind the redrawn part."""
    stats = result.stats
    costs = {"tokens": stats.tokens, "target_calls": stats.target_calls, "seconds": stats.seconds}
    return {"approximate": result.approximate, **costs, "warning": result.warning}


def _wrong(name: str, reason: str) -> ApiError:
    return ApiError(f"Invalid value for '{name}': {reason}.", param=name, code="invalid_value")
