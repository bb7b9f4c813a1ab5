"""What the endpoints of images share: the call behind a body, and images as data, as addresses or as events."""

import asyncio
import base64
import re
import secrets
import time
from collections.abc import Awaitable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from studio import decoding_options, decodings_with
from studio.saving import METADATA_KEY
from studio.ui.api.asking import chosen_model, event
from studio.ui.api.errors import ApiError, ApiRoute, not_here
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server.models import fitting_decodings

_OWN = ("seed", "guidance_scale", "temperature", "top_k", "top_p")
_FILE = re.compile(r"[\w-]{43}\.(png|webp|jpeg)")


def sampling_of(body: Any, **more: Any) -> GenerateRequest:
    """The call behind a body.

    Args:
        body: an `ImageRequest` or an `EditForm`.
        more: further fields of `GenerateRequest`.

    Raises:
        StudioError: a parameter that cannot be served.
    """
    model = chosen_model(body.model, "pipeline")
    decoding = fitting_decodings(model)[0] if body.decoding is None else body.decoding
    options = {name: value for name in decoding_options() if (value := getattr(body, name)) is not None}
    if body.num_inference_steps is not None:
        owners = decodings_with("steps")
        if decoding not in owners or "steps" in options:
            refuse("num_inference_steps", f"it is the option steps of the decodings {', '.join(owners)}")
        options["steps"] = body.num_inference_steps
    own = {name: getattr(body, name) for name in _OWN}
    count = 1 if body.n is None else body.n
    return GenerateRequest(model, body.prompt, count, **own, decoding=decoding, options=options, **more)


class ImageAnswers:
    """How the images of a request are answered.

    Args:
        body: an `ImageRequest` or an `EditForm`.
        folder: where files of images are kept, which `studio.ui.server.storage` sweeps; `None`: nowhere.

    Raises:
        ApiError: a parameter that cannot be served.
    """

    def __init__(self, body: Any, folder: Path | None) -> None:
        self.format = body.output_format or "png"
        self.quality = 100 if body.output_compression is None else body.output_compression
        self.folder = folder if body.response_format == "url" else None
        if self.format == "png" and self.quality != 100:
            refuse("output_compression", "PNG loses nothing: leave it out, or take output_format webp or jpeg")
        if body.response_format == "url" and body.stream:
            refuse("response_format", "a stream carries the images themselves: take b64_json")
        if body.response_format == "url" and folder is None:
            refuse("response_format", "this server keeps no files: take b64_json")

    async def whole(self, images: Sequence[Image], seeds: Sequence[int], request: Request) -> dict[str, Any]:
        """The answer with all images of a request.

        Args:
            images: PNGs with their settings, as of `as_files`.
            seeds: that of each.
            request: what is answered.
        """
        data = [{**await self._given(image, request), "seed": seed} for image, seed in zip(images, seeds)]
        shared = {"output_format": self.format, "size": size_of(images[0])}
        return {"created": int(time.time()), "data": data, "background": "opaque", **shared}

    async def _given(self, image: Image, request: Request) -> dict[str, str]:
        """The image itself, or its address."""
        data = await asyncio.to_thread(self._encoded, image)
        if self.folder is None:
            return {"b64_json": base64.b64encode(data).decode()}
        path = self.folder / "api" / f"{secrets.token_urlsafe(32)}.{self.format}"
        await asyncio.to_thread(_write, path, data)
        return {"url": str(request.url_for("file", name=path.name))}

    def completed(
        self, kind: str, images: Sequence[Image], seeds: Sequence[int], **more: Any
    ) -> Iterator[Awaitable[str]]:
        """The events of finished images; `kind` begins their type, and `more` are further fields of each."""
        for place, (image, seed) in enumerate(zip(images, seeds)):
            own = {"image_index": place, "seed": seed, "size": size_of(image)}
            yield self.event(f"{kind}.completed", image, **own, **more)

    async def event(self, kind: str, image: Image, **more: Any) -> str:
        """A server-sent event with an image."""
        data = base64.b64encode(await asyncio.to_thread(self._encoded, image)).decode()
        shared = {"background": "opaque", "output_format": self.format, "quality": "auto"}
        return event({"type": kind, "created_at": int(time.time()), **shared, "b64_json": data, **more}, kind)

    def _encoded(self, image: Image) -> bytes:
        """The bytes of an image; those of a finished PNG hold its settings."""
        file, info = BytesIO(), PngInfo()
        if self.format == "png":
            if settings := image.info.get(METADATA_KEY):
                info.add_itxt(METADATA_KEY, settings)
            image.save(file, "PNG", pnginfo=info)
        else:
            image.convert("RGB").save(file, self.format.upper(), quality=self.quality)
        return file.getvalue()


def files_router(folder: Path | None) -> APIRouter:
    """The files of images that are answered as addresses; `folder` as of `ImageAnswers`."""
    router = APIRouter(route_class=ApiRoute)

    @router.get("/v1/images/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> FileResponse:
        if not _FILE.fullmatch(name):
            raise not_here(request)
        if folder is None or not (path := folder / "api" / name).is_file():
            raise ApiError("There is no such image: images are kept for an hour at most.", 404)
        return FileResponse(path)

    return router


def size_of(image: Image) -> str:
    """Width and height, as in "256x256"."""
    return f"{image.width}x{image.height}"


def refuse(name: str, reason: str) -> NoReturn:
    """Refuse a parameter.

    Raises:
        ApiError: always.
    """
    raise ApiError(f"Unsupported value: '{name}'; {reason}.", param=name, code="unsupported_parameter")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
