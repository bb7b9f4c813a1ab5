"""What stands in front of the app: sizes, files, addresses, other sites, connections, and who counts as a client."""

import asyncio
import json
import socket
import time

import httpx
import pytest
from gradio.utils import get_upload_folder

from studio.ui.server import run as running
from studio.ui.server.middleware import API, TOOLS, UPLOAD, GuardMiddleware, _Counted, _names_other_file, _Refusal
from studio.ui.server.session import CLIENT, LISTENER, Listeners, client_of

MIB = 1 << 20
A_FILE = {"_type": "gradio.FileData"}


def chunks(total):
    """A body without a length."""
    for _ in range(-(-total // 65536)):
        yield b"x" * 65536


def form(files=0, size=10, fields=()):
    """What `httpx` takes for a form."""
    names = [("files", (f"{number}.png", b"x" * size)) for number in range(files)]
    return {"files": [*names, *((name, (None, value)) for name, value in fields)]}


@pytest.mark.parametrize("path", ["run/upload", "call/upload", "api/upload", "queue/join", "call/generate", "x/upload",
                                  "component_server", "upload/x", "cancel", "login"])  # fmt: skip
@pytest.mark.parametrize("kind", ["json", "form", "chunked"])
def test_no_message_is_larger_than_allowed_whatever_its_route(address, path, kind):
    bodies = {"json": {"json": {"data": ["x" * MIB]}}, "form": form(1, MIB), "chunked": {"content": chunks(2 * MIB)}}
    refused = httpx.post(f"{address}gradio_api/{path}", **bodies[kind])
    assert refused.status_code in (404, 413), refused.text
    assert refused.json()["detail"]


FORMS = [form(1, 200_000), form(3, 60_000), form(1, 10, [("field", "x" * 200_000)]), form(0, 0, [("a", "x" * 200_000)])]
FORMS += [form(20, 1), {"content": chunks(MIB), "headers": {"content-type": "multipart/form-data; boundary=x"}}]
PARTS = b"".join(b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n\r\n' for _ in range(99))
FORMS += [{"content": PARTS + b"--x--\r\n", "headers": {"content-type": 'multipart/form-data; Boundary="x"'}}]


@pytest.mark.parametrize("body", FORMS)
def test_an_upload_is_counted_whole(address, body):
    refused = httpx.post(f"{address}gradio_api/upload", **body)
    assert refused.status_code in (400, 413) and refused.text


def test_eight_files_of_together_the_size_of_one_pass(address):
    assert len(httpx.post(f"{address}gradio_api/upload", **form(8, 10_000)).json()) == 8


def test_a_body_that_is_counted_is_read_no_further():
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"x" * 65536, "more_body": True}

    with pytest.raises(_Refusal):
        asyncio.run(_Counted(receive, MIB).whole())
    assert len(read) == MIB // 65536 + 1


@pytest.mark.parametrize("body", [b"x" * 30 * MIB, chunks(30 * MIB)])
def test_who_sends_too_much_reads_why(address, body):
    refused = httpx.post(f"{address}gradio_api/call/generate", content=body)
    assert refused.status_code == 413 and "shorten your text" in refused.json()["detail"]


def test_who_asks_for_leave_to_send_too_much_is_refused_at_once(address):
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {MIB}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"give a smaller image, of at most 0.1 MB" in answer


@pytest.mark.parametrize("path", ["run/upload", "call/ask", "queue/join", "call/ask/upload", "x/upload"])
@pytest.mark.parametrize("web", ["http://127.0.0.1:1/a.png", "https://example.org/a.png", "HTTP://example.org/a.png"])
def test_no_route_takes_an_address_for_a_file(address, path, web):
    data = [{"path": web, "meta": A_FILE}, "what", "tiny", "divprune", 0.2, 4]
    refused = httpx.post(f"{address}gradio_api/{path}", json={"data": data, "fn_index": 0, "session_hash": "x"})
    assert refused.status_code == 400 and "upload the file" in refused.json()["detail"]


@pytest.mark.parametrize("path", ["file=http://example.org/a.png", "file/http://example.org/a.png", "proxy=http://x.hf.space/",
                                  "deep_link?session_hash=x", "file=https%3A%2F%2Fexample.org"])  # fmt: skip
def test_the_server_fetches_nothing_for_a_visitor(address, path):
    assert httpx.get(f"{address}gradio_api/{path}").status_code == 404


def test_deep_messages_do_not_pass():
    assert _names_other_file(b"[" * 200_000) and not _names_other_file(b"no json")
    assert _names_other_file(json.dumps({"data": [[{"path": "/etc/passwd"}]]}).encode())
    assert not _names_other_file(json.dumps({"data": [{"path": "/tmp/a.png", "meta": A_FILE}]}).encode())


def test_pages_of_other_sites_ask_and_read_nothing(address):
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        headers = {"origin": origin}
        assert httpx.post(f"{address}gradio_api/call/generate", json={"data": []}, headers=headers).status_code == 403
        for method in ("GET", "OPTIONS"):
            asks = headers | {"access-control-request-method": "POST"}
            found = httpx.request(method, f"{address}config", headers=asks)
            assert not [name for name in found.headers if name.startswith("access-control")]
    own = {"origin": address.rstrip("/")}
    assert httpx.post(f"{address}gradio_api/call/generate", json={"data": []}, headers=own).status_code == 200


def test_the_page_tells_no_folder_of_this_machine(address):
    from studio.ui.tabs.theme import CSS

    folders = (str(CSS.parent.resolve()), "site-packages")
    for path in ("", "config", "gradio_api/info"):
        text = httpx.get(f"{address}{path}").text.replace(get_upload_folder(), "")
        assert not [folder for folder in folders if folder in text]


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /config HTTP/1.1\r\nHost: x\r\n", b"GET /theme.css HTTP/1.1\r\nHost: x\r\n\r\n"],
)
def test_idle_connections_are_closed(address, monkeypatch, sent):
    monkeypatch.setattr(running, "_IDLE", 0.2)
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        while connection.recv(1 << 16):
            pass
    assert time.monotonic() - began < 8


def asked(gate, client=("1.2.3.4", 5), headers=(), path="/config", method="GET"):
    """The status that a gate answers with, and the client that the app behind it was told."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    gate.app = app
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "client": client}
    asyncio.run(gate({**scope, "query_string": b""}, receive, send))
    return sent[0]["status"], seen[0] if seen else None


def test_a_client_is_an_address_and_cannot_say_that_it_is_another():
    gate = GuardMiddleware(None, Listeners(), 1, 9)
    _, first = asked(gate)
    assert first[CLIENT] == "1.2.3.4"
    stamp = dict(first["headers"])[b"x-studio-client"]
    assert asked(gate, ("127.0.0.1", 1), [(b"x-studio-client", stamp)])[1][CLIENT] == "1.2.3.4"
    for forged in (b"secret 9.9.9.9", b"secret 9.9.9.9 0", b"\xe9 9.9.9.9 0", b""):
        forged = asked(gate, headers=[(b"x-studio-client", forged)])[1]
        assert forged[CLIENT] == "1.2.3.4" and forged[LISTENER] is None
    assert client_of("2001:db8:1:2:3::4") == client_of("2001:db8:1:2::9") != client_of("2001:db8:1:3::4")
    assert client_of("::ffff:1.2.3.4") == "1.2.3.4" and client_of("testclient") == "testclient"


def test_one_client_has_so_many_requests_open():
    gate = GuardMiddleware(None, Listeners(), 1, 2)
    gate._asking["1.2.3.4"] = 2
    assert asked(gate)[0] == 429 and asked(gate, ("1.2.3.5", 1))[0] == 200
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "client": ("1.2.3.4", 5)}
    asyncio.run(gate(scope, receive, send))
    assert sent[0]["status"] == 429 and (b"retry-after", b"2") in sent[0]["headers"]


def test_listeners_are_those_of_the_answer_routes():
    heard = []

    class Ears(Listeners):
        def arrive(self, key):
            heard.append(key)
            super().arrive(key)

    gate = GuardMiddleware(None, Ears(), 1, 9)
    for path in (f"{API}/call/generate/event1", f"{API}/call/v2/generate/event2/", UPLOAD, "/config"):
        asked(gate, path=path)
    assert heard == ["event1", "event2"]


def test_the_call_of_a_tool_listens_for_the_requests_that_it_sends():
    listeners, inner = Listeners(), []

    async def tool(scope, receive, send):
        stamp = dict(scope["headers"])[b"x-studio-client"]
        inner.append(await asyncio.to_thread(asked, gate, ("127.0.0.1", 1), [(b"x-studio-client", stamp)]))
        key = inner[0][1][LISTENER]
        inner.append(listeners.awaits(key))

    gate = GuardMiddleware(tool, listeners, 1, 9)

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": TOOLS, "headers": [], "client": ("1.2.3.4", 1)}
    asyncio.run(gate({**scope, "query_string": b""}, receive, None))
    [(_, seen), while_open] = inner
    assert seen[CLIENT] == "1.2.3.4"
    assert while_open and not listeners.awaits(seen[LISTENER])
