"""What the entry of a cluster does: routes, retries and limits, with replicas that are lost when a test says so."""

import asyncio
import json

import httpx
import pytest

from studio import VisualQuestionPipeline
from studio.errors import StudioError
from studio.ui.api.routes import new_application
from studio.ui.server import limits, metrics, models, worker
from studio.ui.server.forwarding import Forwarder, ReplicaLost, answered
from studio.ui.server.limits import Limits
from studio.ui.server.logs import RequestLog
from studio.ui.server.middleware import GuardMiddleware
from studio.ui.server.models import Device
from studio.ui.server.options import named_sources, prepare_replica
from studio.ui.server.rate_limits import RateLimiter, Rates
from studio.ui.server.scheduler import Overloaded, QueueLimits
from studio.ui.server.session import Listeners

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"


@pytest.fixture
def ask(tiny_pipeline, tiny_reader, monkeypatch):
    """`ask(*faults, **settings)` gives a client of an entry whose replicas have these faults, one a call, then none.

    A fault is an error, or the number of messages after which the replica is lost. `client.calls` has the models asked.
    """
    monkeypatch.setattr(worker, "_workers", [])
    monkeypatch.setattr(worker, "_rates", RateLimiter())
    monkeypatch.setattr(limits, "_limits", Limits())
    monkeypatch.setitem(models._pipelines, "tiny", tiny_pipeline)
    monkeypatch.setitem(models._readers, "emoji-vlm", VisualQuestionPipeline(*tiny_reader))
    prepare_replica("tiny", "tiny", Device(), QueueLimits(8, 4, 8, True), Limits(3, 40, 5000, 64))
    limits.set_limits(Limits(3, 40, 5000, 64, {"tiny": "tiny", "emoji-vlm": "emoji-vlm"}))

    def client(*faults, rates=None, app=None):
        pending, calls, inner = list(faults), [], app or new_application(None)

        def replicas(name):
            async def asked(request, body):
                calls.append(name)
                fault = pending.pop(0) if pending else None
                if isinstance(fault, Exception):
                    raise fault
                number = 0
                async for message in answered(inner, request, body):
                    if number == fault:
                        raise ReplicaLost
                    number += 1
                    yield message

            return asked

        forwarder = Forwarder(
            new_application(None), {name: replicas(name) for name in ("tiny", "emoji-vlm")}, rates or RateLimiter()
        )
        guarded = RequestLog(GuardMiddleware(forwarder, Listeners(), 100_000, 100))
        made = httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://studio")
        made.calls = calls
        return made

    return client


def post(client, path=IMAGES, **body):
    return asyncio.run(client.post(path, json={"prompt": "a pear", "seed": 1, **body}))


def test_a_replica_answers_as_the_server_itself_would(ask):
    found = post(ask(), n=2)
    assert found.status_code == 200 and [each["seed"] for each in found.json()["data"]] == [1, 2]
    assert found.headers["x-request-id"].startswith("req_")
    listed = asyncio.run(ask().get("/v1/models")).json()["data"]
    assert [each["id"] for each in listed] == ["tiny", "emoji-vlm"]


def test_the_model_says_which_replicas_are_asked(ask):
    client = ask()
    assert post(client).status_code == post(client, model="tiny").status_code == 200
    assert post(client, CHAT, model="emoji-vlm").status_code == 400
    missing = post(client, model="gpt-image-1")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert client.calls == ["tiny", "tiny", "emoji-vlm"]
    form = {"model": (None, "tiny"), "n": (None, "2"), "prompt": (None, "a pear")}
    assert asyncio.run(client.post("/v1/images/edits", files=form)).json()["error"]["param"] == "image"
    assert client.calls[3:] == ["tiny"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": 5}', b'{"n": "two", "prompt": "a pear"}', b"[" * 50_000]
)
def test_a_body_that_says_no_model_is_refused_by_a_replica(ask, body):
    found = asyncio.run(ask().post(IMAGES, content=body, headers={"content-type": "application/json"}))
    assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("fault", [0, 1, ReplicaLost()])
def test_a_request_whose_replica_is_lost_is_asked_once_more(ask, fault):
    expected = post(ask()).json()["data"]
    client, before = ask(fault), metrics._retries._value.get()
    found = post(client)
    assert metrics._retries._value.get() == before + 1
    assert found.status_code == 200 and found.json()["data"] == expected and client.calls == ["tiny"] * 2


def test_a_request_is_given_up_after_three_lost_replicas(ask):
    client = ask(0, 1, 0)
    found = post(client)
    assert found.status_code == 503 and found.json()["error"]["code"] == "overloaded" and len(client.calls) == 3
    assert "ask again" in found.json()["error"]["message"] and found.headers["retry-after"] == "5"


def test_a_stream_that_has_begun_ends_with_an_error_and_is_not_asked_again(ask):
    client = ask(3)
    found = post(client, stream=True, partial_images=4)
    events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: ")]
    assert found.status_code == 200 and len(client.calls) == 1
    assert [each.get("type") for each in events[:-1]] == ["image_generation.partial_image"] * len(events[:-1])
    assert "was lost" in events[-1]["error"]["message"] and len(events) > 1


def test_a_full_queue_and_an_error_are_answered_at_once(ask):
    client = ask(Overloaded("All 2 places are taken.", 503, 2), RuntimeError("secret"))
    full, failed = post(client), post(client)
    assert full.status_code == 503 and full.headers["retry-after"] == "2" and len(client.calls) == 2
    assert failed.status_code == 500 and "secret" not in failed.text


def test_rates_hold_at_the_entry(ask):
    client = ask(rates=RateLimiter(Rates(images=3)))
    assert post(client, n=2).status_code == 200
    again = post(client, n=2)
    assert again.status_code == 429 and int(again.headers["retry-after"]) > 0 and len(client.calls) == 1


def test_a_replica_is_told_no_key(ask):
    seen = []

    async def app(scope, receive, send):
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    headers = {"authorization": "Bearer key-of-anna-1", "cookie": "a=b"}
    asyncio.run(ask(app=app).post(IMAGES, json={"prompt": "a pear"}, headers=headers))
    assert seen == [{b"content-type": b"application/json"}]


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_stops_the_work(ask, steps, stream):
    async def leave():
        client = ask()
        body = {"prompt": "a pear", "decoding": "ar", "stream": stream}
        scope = {"type": "http", "method": "POST", "path": IMAGES, "query_string": b"", "client": ("a", 1)}
        parts = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            if not parts:
                await asyncio.sleep(0.3)
                return {"type": "http.disconnect"}
            return parts.pop()

        async def send(_):
            pass

        await client._transport.app({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send)
        for _ in range(500):
            if not worker._workers[0].load:
                break
            await asyncio.sleep(0.02)

    asyncio.run(leave())
    assert 1 < len(steps) < 16 and not worker._workers[0].load


def test_models_have_names_of_their_own():
    assert named_sources(["emoji-ar", " some/folder "]) == {"emoji-ar": "emoji-ar", "folder": "some/folder"}
    assert named_sources(["folder/emoji-ar"]) == {"own-emoji-ar": "folder/emoji-ar"}
    for wrong in (["emoji-ar", "emoji-ar"], ["a/x", "b/x"], ["emoji-ar", ""]):
        with pytest.raises(StudioError, match="Give each model once"):
            named_sources(wrong)
