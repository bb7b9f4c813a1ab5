"""`POST /v1/images/generations`: OpenAI's image API, with the settings of token-based models."""

from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from studio.ui.api.answers import ImageAnswers, refuse, sampling_of, size_of
from studio.ui.api.asking import asking, begun, last_of, streamed
from studio.ui.api.errors import ApiRoute
from studio.ui.api.schemas import ImageRequest
from studio.ui.jobs.generate_job import Progress, Sampled, sample

_KIND = "image_generation"


def images_router(folder: Path | None) -> APIRouter:
    """The endpoint.

    Args:
        folder: as of `ImageAnswers`.
    """
    router = APIRouter(route_class=ApiRoute, tags=["images"])

    @router.post("/v1/images/generations", summary="Sample images")
    async def generate(body: ImageRequest, request: Request) -> Any:  # type: ignore[valid-type]  # made at run time
        answers = ImageAnswers(body, folder)
        if body.partial_images and not body.stream:
            refuse("partial_images", "partial images are for stream: true")
        size = None if body.size == "auto" else body.size
        asked = sampling_of(body, partial_images=body.partial_images or 0, size=size)
        items = sample(asked)
        left = await asking(request, model=asked.model, images=asked.count, decoding=asked.decoding, user=body.user)
        if body.stream:
            first = await begun(items, lambda item: isinstance(item, Sampled) or item.total, left)
            return streamed(_events(answers, asked.seeds, first, items), items, left)
        result = await last_of(items, left)
        assert isinstance(result, Sampled)
        return {**await answers.whole(result.images, asked.seeds, request), "usage": _usage(result)}

    return router


async def _events(
    answers: ImageAnswers, seeds: list[int], first: Progress | Sampled, items: AsyncIterator[Progress | Sampled]
) -> AsyncGenerator[str]:
    """The events of a request: partial images as they come, then each finished image."""
    sent, item = 0, first
    while True:
        for partial in item.partials[sent:]:
            for place, image in enumerate(partial):
                place_of = {"partial_image_index": sent, "image_index": place, "size": size_of(image)}
                yield await answers.event(f"{_KIND}.partial_image", image, **place_of)
            sent += 1
        if isinstance(item, Sampled):
            break
        item = await anext(items)
    for each in answers.completed(_KIND, item.images, seeds, usage=_usage(item)):
        yield await each


def _usage(result: Sampled) -> dict[str, Any]:
    text, image = result.prompt_tokens, result.stats.tokens
    details = {"text_tokens": text, "image_tokens": 0}
    return {
        "input_tokens": text, "input_tokens_details": details, "output_tokens": image, "total_tokens": text + image
    }  # fmt: skip
