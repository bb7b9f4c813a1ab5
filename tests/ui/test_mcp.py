"""The endpoints as tools of the Model Context Protocol, asked as an assistant would ask them."""

import ast
import asyncio
import base64
import io
import time
from urllib.request import urlopen

import httpx
import pytest
import torch
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

from studio.ui.server import session, worker

TOOLS = ["generate", "edit", "tokenize", "detokenize", "ask", "compare"]


@pytest.fixture
def asked(client):
    """Runs what a coroutine makes of a session with the app."""

    def run(use):
        async def talk():
            async with (
                streamable_http_client(f"{client.src}gradio_api/mcp/") as (read, write, _),
                ClientSession(read, write) as session,
            ):
                await session.initialize()
                return await use(session)

        return asyncio.run(talk())

    return run


def test_every_endpoint_is_a_documented_tool(asked):
    tools = asked(lambda session: session.list_tools()).tools
    assert [tool.name for tool in tools] == TOOLS
    for tool in tools:
        assert tool.description
        for name, schema in tool.inputSchema["properties"].items():
            text = schema["description"]
            assert text.endswith("."), f"{tool.name}, {name}: only the first line of a description is shown: {text}"


def test_a_tool_samples(asked, tiny_pipeline):
    call = {"prompt": "a red apple", "count": 1, "seed": 7, "options": {}}
    answer = asked(lambda session: session.call_tool("generate", call))
    assert not answer.isError
    [image], details = ast.literal_eval(answer.content[0].text)
    assert details["seeds"] == [7]
    with urlopen(image["image"]["url"]) as file:
        found = Image.open(io.BytesIO(file.read())).convert("RGB")
    generator = torch.Generator().manual_seed(7)
    assert found.tobytes() == tiny_pipeline("a red apple", generator=generator).images[0].tobytes()


def test_a_tool_says_what_is_wrong(asked):
    answer = asked(lambda session: session.call_tool("generate", {"prompt": "a red apple", "count": 99}))
    assert answer.isError and "from 1 to 16" in answer.content[0].text


def test_an_image_is_given_as_data_and_never_as_a_path_or_a_link(asked, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    data = base64.b64encode((tmp_path / "secret.png").read_bytes()).decode()
    call = {"question": "what is it", "model": "tiny-reader", "method": "uniform", "keep": 0.5, "max_new_tokens": 2}

    async def both(session):
        given = (f"data:image/png;base64,{data}", str(tmp_path / "secret.png"), "https://example.org/a.png")
        return [await session.call_tool("ask", {"image": image, **call}) for image in given]

    as_data, as_path, as_link = asked(both)
    assert not as_data.isError and "visual_tokens" in as_data.content[0].text
    assert as_path.isError and "neither links nor paths" in as_path.content[0].text
    assert as_link.isError and "neither links nor paths" in as_link.content[0].text


def test_tools_say_how_a_file_is_given(asked):
    tools = asked(lambda session: session.list_tools()).tools
    described = {tool.name: tool.inputSchema["properties"] for tool in tools}
    for name, value in (("ask", "image"), ("tokenize", "image"), ("detokenize", "file")):
        assert "data:" in described[name][value]["format"] and "no link" in described[name][value]["description"]
    assert "url to a file" not in str(described)


def test_the_older_transport_is_closed(client):
    for path in ("sse", "messages/?session_id=1"):
        assert httpx.get(f"{client.src}gradio_api/mcp/{path}").status_code == 404


@pytest.mark.parametrize("steps", [0.3], indirect=True)
@pytest.mark.parametrize("leaves", [True, False])
def test_what_a_caller_that_left_asked_for_is_dropped(client, steps, monkeypatch, leaves):
    monkeypatch.setattr(session, "_PATIENCE", 0.5)
    monkeypatch.setattr(worker, "_POLL", 0.1)
    arguments = {"prompt": "a red apple", "count": 1, "seed": 7, "options": {}}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "generate", "arguments": arguments}}
    how = {"json": call, "headers": {"accept": "application/json, text/event-stream"}, "timeout": 60}
    with httpx.stream("POST", f"{client.src}gradio_api/mcp/", **how) as answer:
        ends = time.monotonic() + 30
        while not steps and time.monotonic() < ends:
            time.sleep(0.05)
        text = "" if leaves else answer.read().decode()
    while not worker.is_idle() and time.monotonic() < ends:
        time.sleep(0.05)
    if leaves:
        assert 1 <= len(steps) < 12
    else:
        assert len(steps) >= 15 and '"isError":false' in text
