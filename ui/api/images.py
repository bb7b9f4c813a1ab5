"""`POST /v1/images/generations`: OpenAI's image API, with the settings of token-based models."""

import asyncio
import base64
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from studio import decodings_with
from studio.saving import png_writer
from studio.ui.api.asking import asking, begun, chosen_model, event, last_of, streamed
from studio.ui.api.errors import ApiError, ApiRoute
from studio.ui.api.schemas import ImageRequest
from studio.ui.jobs.generate_job import Progress, Sampled, sample
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server.models import fitting_decodings

if TYPE_CHECKING:
    from PIL.Image import Image

_OWN = ("seed", "guidance_scale", "temperature", "top_k", "top_p")
_OTHERS = {"prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "stream"}
_OTHERS |= {"partial_images", "user", "decoding", "num_inference_steps", *_OWN}
_FILE = re.compile(r"[\w-]{43}\.(png|webp|jpeg)")


def images_router(folder: Path | None) -> APIRouter:
    """The endpoint, and the files of images that are answered as addresses.

    Args:
        folder: where those files are; it is swept by `studio.ui.server.storage`. `None`: there are none.
    """
    router = APIRouter(route_class=ApiRoute, tags=["images"])

    @router.post("/v1/images/generations", summary="Sample images")
    async def generate(body: ImageRequest, request: Request) -> Any:  # type: ignore[valid-type]  # made at run time
        wanted = _Wanted(body, folder)
        asked = wanted.request
        left = await asking(request, model=asked.model, images=asked.count, decoding=asked.decoding, user=body.user)
        items = sample(asked)
        if body.stream:
            first = await begun(items, lambda item: isinstance(item, Sampled) or item.total, left)
            return streamed(_events(wanted, first, items), items, left)
        result = await last_of(items, left)
        assert isinstance(result, Sampled)
        data = [await wanted.image(each, seed, request) for each, seed in zip(result.images, asked.seeds)]
        shared = {"output_format": wanted.format, "size": _size(result.images[0]), "usage": _usage(result)}
        return {"created": int(time.time()), "data": data, "background": "opaque", **shared}

    @router.get("/v1/images/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if folder is None or not _FILE.fullmatch(name) or not (path := folder / "api" / name).is_file():
            raise ApiError("There is no such image: images are kept for an hour at most.", 404)
        return FileResponse(path)

    return router


class _Wanted:
    """A checked request, and how its images are answered.

    Args:
        body: an `ImageRequest`.
        folder: of files.

    Raises:
        StudioError: a parameter that cannot be served.
    """

    def __init__(self, body: Any, folder: Path | None) -> None:
        self.format = body.output_format or "png"
        self.quality = 100 if body.output_compression is None else body.output_compression
        self.folder = folder if body.response_format == "url" else None
        if self.format == "png" and self.quality != 100:
            _refuse("output_compression", "PNG loses nothing: leave it out, or take output_format webp or jpeg")
        if body.response_format == "url" and body.stream:
            _refuse("response_format", "a stream carries the images themselves: take b64_json")
        if body.response_format == "url" and folder is None:
            _refuse("response_format", "this server keeps no files: take b64_json")
        if body.partial_images and not body.stream:
            _refuse("partial_images", "partial images are for stream: true")
        model = chosen_model(body.model, "pipeline")
        decoding = body.decoding or fitting_decodings(model)[0]
        options = {name: value for name, value in body.model_dump(exclude=_OTHERS).items() if value is not None}
        if body.num_inference_steps is not None:
            owners = decodings_with("steps")
            if decoding not in owners or "steps" in options:
                _refuse("num_inference_steps", f"it is the option steps of the decodings {', '.join(owners)}")
            options["steps"] = body.num_inference_steps
        own = {name: getattr(body, name) for name in _OWN}
        size = None if body.size == "auto" else body.size
        count, previews = 1 if body.n is None else body.n, body.partial_images or 0
        self.request = GenerateRequest(
            model, body.prompt, count, **own, decoding=decoding, options=options, partial_images=previews, size=size
        )

    async def image(self, image: "Image", seed: int, request: Request) -> dict[str, Any]:
        """An entry of `data`: the image itself, or its address."""
        data = await asyncio.to_thread(self.encode, image, seed)
        if self.folder is None:
            return {"b64_json": base64.b64encode(data).decode(), "seed": seed}
        path = self.folder / "api" / f"{secrets.token_urlsafe(32)}.{self.format}"
        await asyncio.to_thread(_write, path, data)
        return {"url": str(request.url_for("file", name=path.name)), "seed": seed}

    def encode(self, image: "Image", seed: int | None = None) -> bytes:
        """The bytes of an image; a finished PNG, one with a seed, holds its settings."""
        file = BytesIO()
        if self.format == "png":
            write: Callable[[Any], object] = lambda target: image.save(target, "PNG")  # noqa: E731
            if seed is not None:
                write = png_writer(image, self.request.record, seed)
            write(file)
        else:
            image.convert("RGB").save(file, self.format.upper(), quality=self.quality)
        return file.getvalue()


async def _events(
    wanted: _Wanted, first: Progress | Sampled, items: AsyncIterator[Progress | Sampled]
) -> AsyncGenerator[str]:
    """The events of a request: partial images as they come, then each finished image."""
    shared = {"background": "opaque", "output_format": wanted.format, "quality": "auto"}
    sent, item = 0, first
    while True:
        for partial in item.partials[sent:]:
            for place, image in enumerate(partial):
                data = base64.b64encode(await asyncio.to_thread(wanted.encode, image)).decode()
                content = {"partial_image_index": sent, "image_index": place, "size": _size(image), "b64_json": data}
                yield _event("partial_image", {**shared, **content})
            sent += 1
        if isinstance(item, Sampled):
            break
        item = await anext(items)
    for place, (image, seed) in enumerate(zip(item.images, wanted.request.seeds)):
        data = base64.b64encode(await asyncio.to_thread(wanted.encode, image, seed)).decode()
        content = {"image_index": place, "seed": seed, "size": _size(image), "b64_json": data}
        yield _event("completed", {**shared, **content, "usage": _usage(item)})


def _event(kind: str, content: dict[str, Any]) -> str:
    name = f"image_generation.{kind}"
    return event({"type": name, "created_at": int(time.time()), **content}, name)


def _usage(result: Sampled) -> dict[str, Any]:
    text, image = result.prompt_tokens, result.stats.tokens
    details = {"text_tokens": text, "image_tokens": 0}
    return {
        "input_tokens": text, "input_tokens_details": details, "output_tokens": image, "total_tokens": text + image
    }  # fmt: skip


def _size(image: "Image") -> str:
    return f"{image.width}x{image.height}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _refuse(name: str, reason: str) -> None:
    raise ApiError(f"Unsupported value: '{name}'; {reason}.", param=name, code="unsupported_parameter")
