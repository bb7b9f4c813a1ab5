"""Request ids, JSON log lines, and the count of requests: middleware around everything else."""

import logging
import re
import secrets
import sys
import time
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from studio.checks import json_text
from studio.ui.server import metrics

if TYPE_CHECKING:
    from studio.ui.server.middleware import ASGIApp, Message, Receive, Send

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
FIELDS = "studio.log"  # the key of a scope: what handlers add to the line of a request
_GIVEN = re.compile(r"[\w.-]{1,64}")
_LOG = logging.getLogger("studio.requests")


class JsonLines(logging.Formatter):
    """One JSON object a line, with the id of the request. Prompts, questions and images are never logged."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; its `fields` (a dict) stand beside the message."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{when}.{record.msecs:03.0f}Z", "level": record.levelname.lower()}
        line |= {"message": record.getMessage()} | getattr(record, "fields", {})
        if identifier := REQUEST_ID.get():
            line.setdefault("request_id", identifier)
        if record.exc_info:
            line["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json_text(line)


def use_json_lines() -> None:
    """Write what this package logs as JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    package = logging.getLogger("studio")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)


class RequestLog:
    """Gives each request an id, which its answer carries as `X-Request-ID`, and logs and counts those of the API.

    An id that the client sends is kept if it is short and plain.

    Args:
        app: what handles the requests.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Message", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        identifier = given if _GIVEN.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        fields: dict[str, Any] = {}
        status, began = 0, time.monotonic()

        async def named(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identifier.encode())]}
            await send(message)

        token = REQUEST_ID.set(identifier)
        try:
            await self.app({**scope, FIELDS: fields}, receive, named)
        finally:
            seconds = time.monotonic() - began
            metrics.count_request(scope["path"], status, seconds)
            if scope["path"].startswith("/v1/"):
                line = {"method": scope["method"], "path": scope["path"], "status": status}
                line["seconds"] = round(seconds, 4)
                _LOG.info("request", extra={"fields": line | fields})
            REQUEST_ID.reset(token)
