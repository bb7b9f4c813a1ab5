"""ASGI middleware in front of Gradio and every other route: checks the client, size, origin and files of requests."""

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import parse_qs

from python_multipart.multipart import parse_options_header

from studio.ui.server.failures import error_content
from studio.ui.server.keys import Keys
from studio.ui.server.logs import FIELDS
from studio.ui.server.session import CLIENT, LISTENER, Listeners, client_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Message, Receive, Send], Awaitable[None]]

API = "/gradio_api"
UPLOAD, TOOLS = f"{API}/upload", f"{API}/mcp"
OPENAI = "/v1/"
_CHAT, _FILES = f"{OPENAI}chat/completions", f"{OPENAI}images/"
_EDITS = f"{_FILES}edits"
_PROBES = ("/healthz", "/readyz")
_MOST_BYTES = 1 << 20  # of a message
_MOST_FILES = 8  # of an upload
_LONGEST_PAUSE = 30  # seconds between two parts of a message
_MOST_DISCARDED = 1 << 26  # bytes that a refused request may still send, so that its client reads the answer
_LONGEST_DISCARD = 10  # seconds
_RETRY = b"2"  # seconds after which one of many open requests may be closed
_READS = ("GET", "HEAD", "OPTIONS")
_A_FILE = {"_type": "gradio.FileData"}
_FORWARDED = b"x-studio-client"
_CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}
_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-max-age", b"600"),
)
_CALL = "studio.call"  # the key of a scope: names the request
_CLOSED = (
    "/proxy=", "/deep_link", "/component_server", "/run-history", "/vibe-", "/undo-vibe", "/process_recording",
    "/mcp/sse", "/mcp/messages",
)  # fmt: skip
"""Routes of Gradio that the app does not use: they fetch addresses, store what they are sent, or are a transport of the
Model Context Protocol (the older one) on which nobody knows who still waits for an answer."""


class GuardMiddleware:
    """Limits every request, and refuses those that Gradio would handle unsafely.

    The bytes of every message are counted as they come, whatever its route, type or encoding, since Gradio keeps
    messages in memory whole. Gradio also fetches a file whose path is a web address, and checks the path of an image
    only where the message says that it is a file; both are refused. So are requests of pages of other sites: no
    `Origin` but the server's own is allowed.

    Args:
        app: what handles the requests that pass.
        listeners: is told of the connections on which answers are awaited.
        upload_bytes: of all files of an upload together.
        open_requests: of one client at a time, at most; a page has two of them.
        keys: of the clients; `None` lets everybody in. Probes need none, and neither do files of images, whose
            addresses cannot be guessed.
        origins: other sites whose pages may use the API, as in "https://example.org".
    """

    def __init__(
        self,
        app: ASGIApp,
        listeners: Listeners,
        upload_bytes: int,
        open_requests: float,
        keys: Keys | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self.app, self._listeners, self._open_requests = app, listeners, open_requests
        self._keys, self._origins = keys, origins
        most = upload_bytes + (1 << 16)  # with the names of the files and the boundaries between them
        base64 = most * 4 // 3
        self._most = {UPLOAD: most, _EDITS: most, TOOLS: base64, _CHAT: base64}
        size = f"of at most {upload_bytes / 1e6:.3g} MB"
        self._advice = dict.fromkeys((_EDITS, TOOLS, _CHAT), f"give a smaller image, {size}")
        self._advice[UPLOAD] = f"give a smaller file, {size}"
        self._secret = secrets.token_hex(16)
        self._asking: Counter[str | None] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if path in _PROBES:
            await self.app(scope, receive, send)
            return
        if self._may_share(path, scope):
            headers = dict(scope["headers"])
            send = _shared(send, headers[b"origin"])
            if scope["method"] == "OPTIONS":
                asked = headers.get(b"access-control-request-headers", b"Authorization, Content-Type")
                await _answer(send, 204, b"", [*_PREFLIGHT, (b"access-control-allow-headers", asked)])
                return
        counted = _Counted(receive, self._most.get(path, _MOST_BYTES), self._advice.get(path, "shorten your text"))
        try:
            scope = self._checked(path, scope)
        except _Refusal as refusal:
            await _refuse(send, path, scope, refusal, counted)
            return
        client = scope[CLIENT]
        scope.get(FIELDS, {})["client"] = client
        self._asking[client] += 1
        key = _listens_for(path, scope)
        if key:
            self._listeners.arrive(key)
        try:
            await self._pass(path, scope, counted, send)
        except _Refusal as refusal:
            await _refuse(send, path, scope, refusal, counted)
        finally:
            self._asking[client] -= 1
            if not self._asking[client]:
                del self._asking[client]
            if key:
                self._listeners.leave(key)

    def _may_share(self, path: str, scope: Message) -> bool:
        """Whether this is a request to the API of a page whose site was allowed."""
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        return path.startswith(OPENAI) and origin in self._origins

    def _checked(self, path: str, scope: Message) -> Message:
        """The scope with its client.

        Raises:
            _Refusal: nothing is there, a page of another site asks, the key is wrong, or too many requests are open.
        """
        if _is_closed(path):
            raise _Refusal(404, "There is nothing at this address.")
        foreign = scope["method"] not in _READS and _is_foreign(dict(scope["headers"]))
        if foreign and not self._may_share(path, scope):
            raise _Refusal(403, "A page of another site cannot ask this server: open its own page.")
        scope = self._named(scope)
        if scope[CLIENT] is None and not (path.startswith(_FILES) and scope["method"] in _READS):
            raise _Refusal(401, "This server needs a key: send one of its API keys as Authorization: Bearer KEY.")
        if self._asking[scope[CLIENT]] >= self._open_requests:
            raise _Refusal(429, f"{self._open_requests} requests of yours are open already: close some first.")
        return scope

    async def _pass(self, path: str, scope: Message, counted: "_Counted", send: Send) -> None:
        if scope["method"] in _READS:
            await self.app(scope, counted.receive, send)
            return
        counted.check_length(scope)
        if path == UPLOAD:
            counted.boundary = _boundary(scope)
            await self.app(scope, counted, _guarded(send, counted))
            return
        body = await counted.whole()
        if body is None:
            return
        if not path.startswith(OPENAI) and _names_other_file(body):
            raise _Refusal(400, "No links are read here: upload the file itself, or give a tool its data.")
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await counted.receive()

        await self.app(scope, replay, send)

    def _named(self, scope: Message) -> Message:
        """The scope with its client, and without headers that a client may not set.

        The tools of the Model Context Protocol send requests to this server in turn: these count for the client that
        called the tool, and their answers are awaited as long as that call is open.
        """
        host = (scope.get("client") or ("",))[0]
        client: str | None = client_of(host)
        if self._keys is not None:
            client = self._keys.client_of(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
        call, called, headers = secrets.token_hex(8), None, []
        for name, value in scope["headers"]:
            if name == _FORWARDED:
                secret, _, forwarded = value.decode("latin-1").partition(" ")
                if secrets.compare_digest(secret.encode(), self._secret.encode()):
                    client, _, called = forwarded.rpartition(" ")
            elif name != b"origin":
                headers.append((name, value))
        if client is not None:
            headers.append((_FORWARDED, f"{self._secret} {client} {call}".encode("latin-1", "replace")))
        return {**scope, "headers": headers, CLIENT: client, LISTENER: called, _CALL: call}


class _Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class _Counted:
    """`receive` of a request with limits: bytes, files, and seconds between two parts.

    `advice` says what to do where there are more than `most` bytes.
    """

    def __init__(self, receive: Receive, most: int, advice: str = "shorten your text") -> None:
        self.receive, self._most, self._advice = receive, most, advice
        self._bytes, self._parts, self._tail, self._ended = 0, 0, b"", False
        self.boundary: bytes | None = None
        self.refusal: _Refusal | None = None

    async def __call__(self) -> Message:
        if self.refusal:
            raise self.refusal
        if self._ended:
            return await self.receive()
        try:
            async with asyncio.timeout(_LONGEST_PAUSE):
                message = await self.receive()
        except TimeoutError:
            self._refuse(408, f"Nothing came for {_LONGEST_PAUSE} seconds: send the request again.")
        chunk, self._ended = message.get("body", b""), not message.get("more_body", False)
        self._bytes += len(chunk)
        if self._bytes > self._most:
            self._refuse_size()
        if self.boundary:
            seen = self._tail + chunk
            self._parts += seen.count(self.boundary)
            self._tail = seen[-len(self.boundary) + 1 :]
            if self._parts > _MOST_FILES + 1:
                self._refuse(413, f"A request has at most {_MOST_FILES} files here: send fewer.")
        return message

    async def whole(self) -> bytes | None:
        """The whole body; `None` where the client went away."""
        body = bytearray()
        while not self._ended:
            message = await self()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
        return bytes(body)

    def check_length(self, scope: Message) -> None:
        """Check the length that a request names, before anything of its body is asked for.

        Raises:
            _Refusal: it is larger than allowed.
        """
        if int(dict(scope["headers"]).get(b"content-length", 0)) > self._most:
            self._refuse_size()

    async def discard(self, scope: Message) -> None:
        """Read on for a while: what a client still sends to a closed connection would cost it the answer."""
        if not self._bytes and b"expect" in dict(scope["headers"]):
            return  # it waits for leave to send
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_DISCARD):
                while not self._ended and self._bytes < self._most + _MOST_DISCARDED:
                    message = await self.receive()
                    self._bytes += len(message.get("body", b""))
                    self._ended = not message.get("more_body", False)

    def _refuse_size(self) -> NoReturn:
        self._refuse(413, f"A request has at most {self._most} bytes here: {self._advice}.")

    def _refuse(self, status: int, sentence: str) -> NoReturn:
        self.refusal = _Refusal(status, sentence)
        raise self.refusal


def _guarded(send: Send, counted: _Counted) -> Send:
    """`send` that lets the middleware answer once a request was refused; Gradio would answer with another error."""

    async def guarded(message: Message) -> None:
        if counted.refusal is None:
            await send(message)
        else:
            raise counted.refusal

    return guarded


def _boundary(scope: Message) -> bytes | None:
    """The boundary between parts of a form, parsed as Gradio parses it; `None` where there is none."""
    _, options = parse_options_header(dict(scope["headers"]).get(b"content-type", b""))
    boundary = options.get(b"boundary")
    return b"--" + boundary if boundary else None


def _is_closed(path: str) -> bool:
    """Whether the app does not use this route, or it would let the server fetch an address."""
    if not path.startswith(f"{API}/"):
        return False
    own = path.removeprefix(API)
    fetches = own.startswith(("/file=", "/file/")) and ":/" in own
    return fetches or own.startswith(_CLOSED)


def _is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser sends this for a page of another site."""
    origin = headers.get(b"origin")
    own = (headers.get(b"host"), headers.get(b"x-forwarded-host"))
    return origin is not None and origin.partition(b"://")[2] not in own


def _listens_for(path: str, scope: Message) -> str | None:
    """The session, the event or the call of a tool whose answers are awaited there; `None` on other routes."""
    if scope["method"] == "POST" and path in (TOOLS, f"{TOOLS}/http"):
        return scope[_CALL]
    if scope["method"] != "GET":
        return None
    if path == f"{API}/queue/data":
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    return path.rsplit("/", 1)[-1] if path.startswith(f"{API}/call/") else None


def _names_other_file(body: bytes) -> bool:
    """Whether a message names a file by a web address, or by a path that Gradio would not check."""
    try:
        pending: list[Any] = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:
        return False  # no route can read it either
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and ("://" in path or value.get("meta") != _A_FILE):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


async def _refuse(send: Send, path: str, scope: Message, refusal: _Refusal, counted: _Counted) -> None:
    """Answer with an error, in the form of the API where it is asked."""
    content: dict[str, Any] = {"detail": refusal.sentence}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if path.startswith(OPENAI):
        content = error_content(refusal.sentence, refusal.status, code=_CODES.get(refusal.status))
    elif refusal.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Studio"'))
    if refusal.status == 429:
        headers.append((b"retry-after", _RETRY))
    body = json.dumps(content).encode()
    await _start(send, refusal.status, body, headers)
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if refusal.status != 408:
        await counted.discard(scope)
    await send({"type": "http.response.body", "body": b""})


async def _answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    await _start(send, status, body, headers)
    await send({"type": "http.response.body", "body": body})


async def _start(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})


def _shared(send: Send, origin: bytes) -> Send:
    """`send` that lets a page of this origin read the answer."""

    async def shared(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
            own += [(b"access-control-expose-headers", b"X-Request-ID, Retry-After")]
            message = {**message, "headers": [*message["headers"], *own]}
        await send(message)

    return shared
