"""Requests of the API that need a model go to a replica of it; everything else is answered here.

A replica is wherever the same API runs with one model, such as a process of Ray Serve (`studio.ui.server.cluster`);
nothing here knows of Ray. A request whose replica is lost before its answer began is asked again of another one. Nobody
gets two answers, and a stream that breaks off ends with an error.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.exceptions import HTTPException

from studio.ui.api.asking import chosen_model
from studio.ui.api.errors import error_event, error_response
from studio.ui.server import metrics
from studio.ui.server.logs import FIELDS, REQUEST_ID
from studio.ui.server.rate_limits import RateLimiter
from studio.ui.server.scheduler import Overloaded
from studio.ui.server.session import CLIENT

if TYPE_CHECKING:
    from studio.ui.server.middleware import ASGIApp, Message, Receive, Send

Ask = Callable[[dict[str, Any], bytes], "AsyncGenerator[Message]"]
"""Asks one of the replicas of a model: a request as of `_to_send_on` and its body give the messages of the answer."""
_KINDS = {"/v1/images/": "pipeline", "/v1/chat/": "reader"}
_ATTEMPTS = 3
_RETRY = 5  # seconds after which a lost replica may be back
_LOST = "The processes that worked on this were lost: ask again in a moment."
_BROKEN = "The process that worked on this was lost: ask again."


class ReplicaLost(Exception):
    """A replica ended before its answer did."""


class Forwarder:
    """Sends requests for a model to a replica of it.

    Args:
        app: the API in this process, for everything else.
        replicas: by the name of a model; the API must offer the same models.
        rates: of each client. All requests that are sent on count, refused ones too.
    """

    def __init__(self, app: "ASGIApp", replicas: Mapping[str, Ask], rates: RateLimiter) -> None:
        self.app, self._replicas, self._rates = app, replicas, rates

    async def __call__(self, scope: "Message", receive: "Receive", send: "Send") -> None:
        kind = None
        if scope["type"] == "http" and scope["method"] == "POST":
            kind = next((kind for start, kind in _KINDS.items() if scope["path"].startswith(start)), None)
        if kind is None:
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        try:
            name, images = await _asked(scope, body)
            model = chosen_model(name, kind)
            scope[FIELDS].update(model=model, images=images)
            self._rates.check(scope[CLIENT], images)
            self._rates.count(scope[CLIENT], images)
        except Exception as error:
            await error_response(error)(scope, receive, send)
            return
        passing = asyncio.create_task(self._pass(self._replicas[model], scope, body, receive, send))
        left = asyncio.create_task(_has_left(receive))
        try:
            await asyncio.wait({passing, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            passing.cancel()
        await asyncio.wait({passing})
        if not passing.cancelled():
            passing.result()

    async def _pass(self, ask: Ask, scope: "Message", body: bytes, receive: "Receive", send: "Send") -> None:
        """Pass on the answer of the first replica that gives one. What comes after the head of an answer begins it."""
        head: Message = {}
        is_begun = False
        for attempt in range(_ATTEMPTS):
            if attempt:
                metrics.count_retry()
            try:
                async with aclosing(ask(_to_send_on(scope), body)) as messages:
                    async for message in messages:
                        if message["type"] == "http.response.start":
                            head = message
                            continue
                        if not is_begun:
                            is_begun = True
                            await send(head)
                        await send(message)
                        if not message.get("more_body"):
                            return
                raise ReplicaLost
            except ReplicaLost:
                failed: Exception = Overloaded(_BROKEN if is_begun else _LOST, 503, _RETRY)
                if not is_begun:
                    continue
            except Exception as error:
                failed = error
            break
        if is_begun:
            await send({"type": "http.response.body", "body": error_event(failed).encode(), "more_body": False})
        else:
            await error_response(failed)(scope, receive, send)


def _to_send_on(scope: "Message") -> dict[str, Any]:
    """What a replica must know of a request: no keys, cookies or addresses."""
    kept = [(name, value) for name, value in scope["headers"] if name == b"content-type"]
    request = {name: scope[name] for name in ("method", "path", "query_string")}
    return {**request, "headers": kept, "client": scope[CLIENT], "request_id": REQUEST_ID.get()}


async def _asked(scope: "Message", body: bytes) -> tuple[str | None, int]:
    """The model and the number of images, as far as a body says; what is wrong with it, the replica says."""

    async def once() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    fields: Any = {}
    try:
        if dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/form-data"):
            async with Request(scope, once).form() as form:
                fields = dict(form)
        else:
            fields = json.loads(body)
    except (ValueError, RecursionError, HTTPException):
        pass
    fields = fields if isinstance(fields, dict) else {}
    name, count = fields.get("model"), str(fields.get("n"))
    return name if isinstance(name, str) else None, max(1, int(count)) if count.isdecimal() and len(count) < 9 else 1


async def _has_left(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answered(app: "ASGIApp", asked: dict[str, Any], body: bytes) -> "AsyncGenerator[Message]":
    """What a replica does: the messages of an application's answer to a request that was sent on to it.

    Closing it cancels the work.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> "Message":
        if not parts:
            await asyncio.Event().wait()  # until it is cancelled: who leaves is seen at the entry
        return parts.pop()

    request = {name: asked[name] for name in ("method", "path", "query_string", "headers")}
    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", **request}
    REQUEST_ID.set(asked["request_id"])
    work = asyncio.ensure_future(app({**scope, CLIENT: asked["client"], FIELDS: {}}, receive, messages.put))
    work.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
        await work
    finally:
        work.cancel()
