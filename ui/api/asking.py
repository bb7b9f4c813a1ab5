"""What the endpoints share: which model is asked for, who asks, and events as they come."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from studio.checks import shown
from studio.ui.api.errors import ApiError, error_event
from studio.ui.server.limits import limits
from studio.ui.server.logs import FIELDS
from studio.ui.server.models import bundled_models
from studio.ui.server.session import ASKER, CLIENT

T = TypeVar("T")


def offered_models() -> dict[str, str]:
    """The kind ("pipeline" or "reader") of every model that the API offers, the served one first."""
    readers, tokenizers = bundled_models("reader"), bundled_models("tokenizer")
    names = limits().models or dict.fromkeys([*bundled_models("pipeline"), *readers])
    return {name: "reader" if name in readers else "pipeline" for name in names if name not in tokenizers}


def chosen_model(name: str | None, kind: str) -> str:
    """The model of this name, or the first of its kind for `None`.

    Raises:
        ApiError: there is none, or it is of another kind.
    """
    models = offered_models()
    fitting = [each for each, own in models.items() if own == kind]
    if name is None and fitting:
        return fitting[0]
    if name not in fitting:
        verb = "samples images" if kind == "pipeline" else "reads images"
        wrong = f"The model {shown(name)} does not exist here" if name not in models else f"{name} never {verb}"
        raise ApiError(f"{wrong}: take one of {', '.join(fitting) or 'none'}.", 404, "model", "model_not_found")
    return str(name)


async def asking(request: Request, **fields: Any) -> "asyncio.Task[None]":
    """Note who asks, for the queue, and what, for the log.

    Returns:
        A task that is done when the client has left; cancel it at the end.
    """
    request.scope[FIELDS].update({name: value for name, value in fields.items() if value is not None})

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.create_task(gone())
    ASKER.set((request.scope[CLIENT], lambda: not left.done()))
    return left


async def last_of(items: AsyncIterator[T], left: "asyncio.Task[None]") -> T:
    """The last item."""
    found: list[T] = []
    try:
        async for item in items:
            found = [item]
    finally:
        left.cancel()
    return found[0]


async def begun(items: AsyncIterator[T], is_begun: Any, left: "asyncio.Task[None]") -> T:
    """The first item that shows that the request was taken, before the answer has a status."""
    try:
        async for item in items:
            if is_begun(item):
                return item
    except BaseException:
        left.cancel()
        raise
    raise AssertionError("work ends with its result")


def streamed(events: AsyncGenerator[str], items: AsyncIterator[Any], left: "asyncio.Task[None]") -> StreamingResponse:
    """An answer of server-sent events made of items; an error that comes after the first is an event, too."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except Exception as error:
            yield error_event(error)
        finally:
            left.cancel()
            for each in (events, items):
                await each.aclose()  # type: ignore[union-attr]  # both are generators

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(content)}\n\n"
