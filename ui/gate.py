"""What is looked at before Gradio sees a request: messages that are too long, and files that were not uploaded."""

import json

_MOST_BYTES = 1 << 20
_A_FILE = {"_type": "gradio.FileData"}


class Gate:
    """ASGI middleware for POST requests, uploads left out (Gradio limits these).

    Gradio keeps a message in memory whole, and fetches a file whose path is an address of the web, however long. Of a
    picture it checks the path only where the message says that this is a file.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith("/upload"):
            await self.app(scope, receive, send)
            return
        body, ended = b"", False
        while not ended:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            ended = not message.get("more_body", False)
            if len(body) > _MOST_BYTES:
                await _refuse(send, 413, f"A request has at most {_MOST_BYTES} bytes: shorten your text.")
                return
        if _names_other_file(body):
            await _refuse(send, 400, "Only uploaded files are read here: upload the file itself.")
            return

        async def replay():
            nonlocal ended
            if ended:
                ended = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)


def _names_other_file(body):
    """Whether a message has a path that is an address, or that Gradio would not look at."""
    try:
        pending = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
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


async def _refuse(send, status, sentence):
    content = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
