"""The app for many, with the tiny pipeline: whose images are whose, and what a request may not do."""

import asyncio
import json
import threading
from collections import defaultdict
from contextvars import copy_context
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from gradio.context import LocalContext
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from PIL import Image

from studio import StudioError, decoding_named
from studio.ui.app import build_app
from studio.ui.jobs import generate_job as sampling
from studio.ui.jobs.generate_job import Sampled, sample
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Sketch
from studio.ui.server import limits, models, options, worker
from studio.ui.server.limits import Limits
from studio.ui.server.models import Device
from studio.ui.server.options import devices_of, prepare
from studio.ui.server.run import open_socket
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.worker import DeviceWorker
from studio.ui.tabs.components import uploaded


@pytest.fixture
def pipe(tiny_pipeline, monkeypatch):
    """The app samples with the tiny pipeline, eight images a call."""
    monkeypatch.setattr(worker, "_workers", [DeviceWorker(Device(), QueueLimits(max_batch=8))])
    monkeypatch.setattr(limits, "_limits", Limits())
    monkeypatch.setitem(models._pipelines, "tiny", tiny_pipeline)
    return tiny_pipeline


@pytest.fixture
def calls(pipe, monkeypatch):
    """How many requests each call drew."""
    sizes, together = [], sampling.sample_together
    monkeypatch.setattr(
        sampling, "sample_together", lambda requests, jobs: sizes.append(len(requests)) or together(requests, jobs)
    )
    return sizes


def sampled(requests):
    """What becomes of requests of as many users that all wait before the first is sampled."""
    held = threading.Event()
    worker._workers[0]._thread.submit(held.wait)

    async def follow(number, request):
        LocalContext.request.set(SimpleNamespace(session_hash=number))
        return [news async for news in sample(request)]

    async def all_of_them():
        tasks = [asyncio.create_task(follow(*each)) for each in enumerate(requests)]
        await asyncio.sleep(0.05)
        held.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(all_of_them())


def alone(pipe, request):
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    how = {"decoding": decoding_named(request.decoding).settings(), **request.settings}
    return pipe(request.prompt, num_images_per_prompt=request.count, generator=generators, **how)


def same(one, other):
    """Whether two images are of the same tokens: pixels of a batch differ from single ones by rounding."""
    return abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


@pytest.mark.parametrize("decoding", ["ar", "speculative"])
def test_everybody_gets_the_images_of_a_call_of_their_own(pipe, calls, decoding):
    requests = [GenerateRequest("tiny", f"a {word} apple", count, seed, decoding=decoding)
              for word, count, seed in (("red", 2, 7), ("green", 1, 7), ("blue", 3, 50))]  # fmt: skip
    found = sampled(requests)
    assert calls == [3]
    for request, news in zip(requests, found):
        expected = alone(pipe, request)
        last = news[-1]
        assert all(same(*pair) for pair in zip(last.images, expected.images)) and len(last.images) == request.count
        records = [json.loads(image.info["studio"]) for image in last.images]
        assert [(record["call"]["prompt"], record["seed"]) for record in records] == [
            (request.prompt, seed) for seed in request.seeds
        ]
        assert last.batch_size == 6 and last.stats.tokens == expected.stats.tokens
        assert all(len(each.images) == request.count for each in news if not isinstance(each, Sampled) and each.images)


@pytest.mark.parametrize("decoding", ["speculative", "lantern"])
def test_everybody_sees_what_became_of_the_drafts_of_their_own_image(pipe, calls, monkeypatch, decoding):
    monkeypatch.setattr(sampling.Pace, "is_due", lambda pace: True)
    options = {"k": 8} if decoding == "lantern" else {}
    requests = [GenerateRequest("tiny", f"a {word} apple", count, seed, decoding=decoding, options=options)
              for word, count, seed in (("red", 2, 7), ("green", 1, 8), ("blue", 3, 50))]  # fmt: skip
    found = sampled(requests)
    assert calls == [3]
    ends = []
    for request, news in zip(requests, found):
        call = sampling.Call(pipe, request)
        expected = call.trace(Sketch(call(lambda sketch: False).tokens))
        *underway, last = news
        previews = [each.trace for each in underway if each.images]
        ends.append(last.trace)
        assert last.trace == expected and expected.sampled == 16
        assert previews and all(trace.accepted <= expected.accepted for trace in previews)
        assert all(count <= expected.rejected[place] for trace in previews for place, count in trace.rejected.items())
    assert len({(trace.accepted, tuple(trace.rejected.items())) for trace in ends}) > 1


def test_other_settings_are_sampled_in_another_call(pipe, calls):
    settings = [{}, {"guidance_scale": 2.0}, {"top_k": 5}, {"guidance_scale": 2.0}, {}]
    found = sampled([GenerateRequest("tiny", "a pear", 1, 3, **each) for each in settings])
    assert calls == [2, 2, 1]
    for each, news in zip(settings, found):
        expected = alone(pipe, GenerateRequest("tiny", "a pear", 1, 3, **each)).images[0]
        assert same(news[-1].images[0], expected)


def test_what_the_pipeline_refuses_keeps_nobody_else_from_sampling(pipe, calls):
    good, bad = sampled([GenerateRequest("tiny", "a pear", 1, 2), GenerateRequest("tiny", "a plum", 1, 3, size="9x9")])
    assert calls == [2] and len(good[-1].images) == 1
    assert isinstance(bad, StudioError) and "16x16" in str(bad)


def test_an_empty_prompt_waits_for_no_device(pipe):
    with pytest.raises(StudioError, match="prompt is empty"):
        sample(GenerateRequest("tiny", " ", 1, 3))


def test_a_port_that_is_taken_is_noticed_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(options, "prepare", lambda *given: pytest.fail("loaded"))
    with open_socket("127.0.0.1", 0) as taken, pytest.raises(StudioError, match="cannot listen on"):
        port = taken.getsockname()[1]
        options.serve("127.0.0.1", port, model="tiny", devices=[], queue_limits=QueueLimits(), limits=Limits())


def test_a_call_that_fails_is_done_again_for_each_alone(pipe, calls, monkeypatch):
    call = sampling.Call.__call__

    def fail(self, on_step):
        if any(request.prompt == "a bad pear" for request in self.requests):
            raise RuntimeError("out of memory")
        return call(self, on_step)

    monkeypatch.setattr(sampling.Call, "__call__", fail)
    prompts = ("a pear", "a bad pear", "a plum")
    pear, bad, plum = sampled([GenerateRequest("tiny", prompt, 1, seed) for seed, prompt in enumerate(prompts)])
    assert calls == [3, 1, 1, 1] and str(bad) == "out of memory"
    for seed, prompt, found in ((0, "a pear", pear), (2, "a plum", plum)):
        assert same(found[-1].images[0], alone(pipe, GenerateRequest("tiny", prompt, 1, seed)).images[0])


def test_a_server_answers_within_its_limits(address):
    client = Client(address, verbose=False)
    [found], details = client.predict("a red apple", 1, 7, api_name="/generate")
    assert details["seeds"] == [7] and details["sampled_together"] == 1
    assert json.loads(Image.open(found["image"]).info["studio"])["seed"] == 7
    with pytest.raises(Exception, match="from 1 to 2, not 3"):
        client.predict("a red apple", 3, api_name="/generate")
    with pytest.raises(Exception, match="41 characters; at most 40"):
        client.predict("a" * 41, 1, api_name="/generate")
    with pytest.raises(Exception, match="from 1 to 4, not 9"):
        client.predict("a pear", ["tiny: ar", "tiny: speculative"], 9, api_name="/compare")


def test_no_path_of_a_request_is_opened(address, tmp_path, tiny_folder, monkeypatch):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (16, 16), "red").save(secret)
    opened = []
    monkeypatch.setattr("studio.images.open_image", lambda *given: opened.append(given))
    monkeypatch.setattr("studio.load", lambda *given, **_: opened.append(given), raising=False)
    client = Client(address, verbose=False)
    for model in (str(tiny_folder), "~/model", "owner/repository", "../.."):
        with pytest.raises(Exception, match="This server offers tiny"):
            client.predict("a pear", [f"{model}: ar", "tiny: ar"], 1, api_name="/compare")
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
        for name, data in (
            ("tokenize", [{"path": str(secret), **meta}, "tiny", None, False]),
            ("detokenize", [{"path": str(secret), **meta}, "tiny"]),
            ("ask", [{"path": str(secret), **meta}, "what", "tiny", "divprune", 0.2, 8, None]),
        ):
            assert "error" in _answer(address, name, data)
    assert not opened


def test_the_app_itself_reads_uploaded_files_only(tmp_path):
    secret = {"path": str(tmp_path / "secret.png")}
    assert uploaded(secret) == secret["path"] and uploaded(None) == ""
    inside = {"path": f"{get_upload_folder()}/image.png"}

    def asked():
        LocalContext.request.set(SimpleNamespace(session_hash=None))
        assert uploaded(inside) == inside["path"]
        for path in (secret["path"], f"{get_upload_folder()}/../secret.png", "secret.png"):
            with pytest.raises(StudioError, match="not uploaded"):
                uploaded({"path": path})

    copy_context().run(asked)


def test_what_is_given_is_limited(address, tmp_path):
    client = Client(address, verbose=False)
    large, wide = tmp_path / "large.png", tmp_path / "wide.png"
    large.write_bytes(bytes(100_001))
    Image.new("RGB", (100, 51)).save(wide)
    with pytest.raises(Exception, match="(?i)413|size|large"):
        client.predict(handle_file(str(large)), "tiny", api_name="/tokenize")
    with pytest.raises(Exception, match="at most 5000"):
        client.predict(handle_file(str(wide)), "tiny", api_name="/tokenize")
    with pytest.raises(Exception, match="from 1 to 64, not 65"):
        client.predict(handle_file(str(wide)), "what", "tiny", "divprune", 0.2, 65, api_name="/ask")
    web = {"path": "http://127.0.0.1:1/image.png", "meta": {"_type": "gradio.FileData"}}
    refused = httpx.post(f"{address}gradio_api/call/tokenize", json={"data": [web, "tiny", None, False]})
    assert refused.status_code == 400 and "upload the file itself" in refused.json()["detail"]
    refused = httpx.post(f"{address}gradio_api/call/generate", json={"data": ["a" * (1 << 20)]})
    assert refused.status_code == 413 and "shorten your text" in refused.json()["detail"]


def test_where_one_image_is_allowed_nobody_is_asked_how_many(pipe, monkeypatch):
    monkeypatch.setattr(limits, "_limits", Limits(images=1))
    fields = {each["props"].get("elem_id"): each["props"] for each in build_app("tiny").config["components"]}
    assert not fields["count"]["visible"] and not fields["compare-count"]["visible"]
    with pytest.raises(StudioError, match="from 1 to 1, not 2"):
        GenerateRequest("tiny", "a pear", 2)


def test_devices_are_listed_with_commas():
    assert devices_of(None, None) == [Device()]
    assert devices_of("cuda:0, cuda:1", "float32") == [Device("cuda:0", "float32"), Device("cuda:1", "float32")]
    with pytest.raises(StudioError, match="named twice"):
        prepare("tiny", devices_of("cpu,cpu", None), QueueLimits(), Limits())


def test_every_device_has_models_of_its_own(tiny_pipeline, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "_elsewhere", defaultdict(dict))
    monkeypatch.setattr(limits, "_limits", Limits())
    monkeypatch.setattr(
        "studio.load", lambda name, **where: asked.append((name, where)) or tiny_pipeline, raising=False
    )
    for device in (Device("cpu"), Device("meta", "float32"), Device("cpu")):
        assert models.get_pipeline("mine", device) is tiny_pipeline
    assert asked == [("mine", {"device": "cpu"}), ("mine", {"device": "meta", "dtype": "float32"})]
    assert "mine" not in models._pipelines


def _answer(address, name, data):
    """What a program gets that writes its messages itself."""
    asked = httpx.post(f"{address}gradio_api/call/{name}", json={"data": data})
    if asked.status_code != 200:
        return f"error {asked.status_code}"
    with httpx.stream("GET", f"{address}gradio_api/call/{name}/{asked.json()['event_id']}", timeout=20) as answer:
        return answer.read().decode()
