"""Requests that join and leave a running batch of the tiny pipeline: whose images are whose, and who fails alone."""

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradio.context import LocalContext

from studio import StudioError, decoding_named
from studio.pipelines.continuous import PipelineBatch
from studio.ui.jobs import generate_job
from studio.ui.jobs.generate_job import Sampled, sample
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server import limits, models, worker
from studio.ui.server.limits import Limits
from studio.ui.server.models import Device
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.worker import DeviceWorker, Intake, follow

LIMIT = 120  # seconds, far more than is needed on a busy machine
WORDS = ("red", "green", "blue")
SETTINGS = [{}, {"guidance_scale": 2.0}, {"temperature": 0.5, "top_k": 9}, {"guidance_scale": 1.0, "top_p": 0.8}]
DECODINGS = [("ar", {}), ("exact", {}), ("jacobi", {"window": 3})]


def in_running_batches(pipe, monkeypatch):
    """The app samples with a pipeline, called "tiny", in running batches of up to eight images."""
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(worker, "_workers", [DeviceWorker(Device(), QueueLimits(max_batch=8, continuous=True))])
    monkeypatch.setattr(limits, "_limits", Limits())
    monkeypatch.setitem(models._pipelines, "tiny", pipe)
    return pipe


def sizes_of_steps(monkeypatch, attribute="size"):
    """A list of what an attribute of the running batch is at each step."""
    sizes, step = [], PipelineBatch.step

    def counted(self):
        sizes.append(getattr(self, attribute))
        return step(self)

    monkeypatch.setattr(PipelineBatch, "step", counted)
    return sizes


@pytest.fixture
def pipe(tiny_pipeline, monkeypatch):
    return in_running_batches(tiny_pipeline, monkeypatch)


@pytest.fixture
def steps(pipe, monkeypatch):
    """The number of images of each step."""
    return sizes_of_steps(monkeypatch)


def mixed(count):
    """Requests that differ in everything."""
    return [
        GenerateRequest("tiny", f"a {WORDS[number % 3]} apple", 1 + number % 3, 10 * number,
                        **SETTINGS[number % len(SETTINGS)], decoding=decoding, options=options)
        for number in range(count) for decoding, options in [DECODINGS[number % len(DECODINGS)]]
    ]  # fmt: skip


async def news_of(request, user, pause=0.0):
    await asyncio.sleep(pause)
    LocalContext.request.set(SimpleNamespace(session_hash=user))
    return [news async for news in sample(request)]


def sampled(requests, held=True, pauses=None):
    """What becomes of requests of as many users, all waiting before the first begins if `held`."""
    gate = threading.Event()
    if held:
        worker._workers[0]._thread.submit(gate.wait, LIMIT)

    async def scenario():
        tasks = [
            asyncio.create_task(news_of(request, number, pauses[number] if pauses else 0))
            for number, request in enumerate(requests)
        ]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT)

    return asyncio.run(scenario())


def news_of_those_who_stay(requests, steps, monkeypatch):
    """What becomes of the first and the third of three requests when the second leaves after three steps.

    All wait before the first begins, and the fourth step waits until the second has left.
    """
    gate, has_left, step = threading.Event(), threading.Event(), PipelineBatch.step
    monkeypatch.setattr(PipelineBatch, "step", lambda self: (len(steps) < 3 or has_left.wait(LIMIT)) and step(self))
    worker._workers[0]._thread.submit(gate.wait, LIMIT)

    async def scenario():
        tasks = [asyncio.create_task(news_of(request, number)) for number, request in enumerate(requests)]
        await asyncio.sleep(0.05)
        gate.set()
        while len(steps) < 3:
            await asyncio.sleep(0.005)
        tasks[1].cancel()
        await asyncio.sleep(0.05)
        has_left.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, gone, third = asyncio.run(asyncio.wait_for(scenario(), LIMIT))
    assert isinstance(gone, asyncio.CancelledError) and is_idle()
    return first, third


def check(pipe, request, news):
    """The result is what single calls sample."""
    assert isinstance(news, list), news
    found = news[-1]
    assert isinstance(found, Sampled) and len(found.images) == request.count
    assert found.stats.tokens == 16 * request.count and found.prompt_tokens == 3
    for seed, image in zip(request.seeds, found.images):
        plain = decoding_named("ar").settings()
        generator = torch.Generator().manual_seed(seed)
        expected = pipe(request.prompt, generator=generator, decoding=plain, **request.settings).images[0]
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def is_idle():
    ends = time.monotonic() + LIMIT
    while worker._workers[0].load and time.monotonic() < ends:
        time.sleep(0.01)
    return not worker._workers[0].load


def test_requests_that_differ_in_everything_share_steps(pipe, steps):
    requests = mixed(12)
    for request, news in zip(requests, sampled(requests)):
        check(pipe, request, news)
        assert news[-1].stats.decoding in ("ar", "jacobi")  # whichever the batch took, whatever was asked for
    images = sum(request.count for request in requests)
    assert max(steps) in (7, 8) and len(steps) < 16 * images / 4 and is_idle()


def test_a_request_joins_what_is_under_way(pipe, steps, monkeypatch):
    step = PipelineBatch.step
    monkeypatch.setattr(PipelineBatch, "step", lambda self: time.sleep(0.02) or step(self))
    requests = [GenerateRequest("tiny", "a red apple", 1, seed, decoding="ar") for seed in range(3)]
    for request, news in zip(requests, sampled(requests, held=False, pauses=[0, 0.06, 0.12])):
        check(pipe, request, news)
    assert steps[0] == 1 and max(steps) > 1 and sum(later < sooner for sooner, later in zip(steps, steps[1:])) >= 1


def test_who_leaves_frees_its_rows_and_changes_nobody(pipe, steps, monkeypatch):
    requests = [GenerateRequest("tiny", "a red apple", 2, seed, decoding="ar", **SETTINGS[1]) for seed in (5, 50, 90)]
    for request, news in zip(requests[::2], news_of_those_who_stay(requests, steps, monkeypatch)):
        check(pipe, request, news)
    assert max(steps) == 6 and 4 in steps[:8]


def test_a_request_that_fails_fails_alone(pipe, steps, monkeypatch):
    join = PipelineBatch.join

    def broken(self, prompt, **given):
        if "blue" in prompt:
            raise RuntimeError("cannot be encoded")
        return join(self, prompt, **given)

    monkeypatch.setattr(PipelineBatch, "join", broken)
    good, empty, blue, small = (
        GenerateRequest("tiny", prompt, 1, 3, decoding="ar", size=size)
        for prompt, size in (("a red apple", None), (" ", None), ("a blue apple", None), ("a red apple", "9x9"))
    )
    found = sampled([good, empty, blue, small])
    check(pipe, good, found[0])
    assert isinstance(found[1], StudioError) and "prompt is empty" in str(found[1])
    assert isinstance(found[2], RuntimeError) and "16x16" in str(found[3])
    assert len(steps) <= 16 and is_idle()


def test_after_a_step_that_fails_each_is_done_alone(pipe, monkeypatch):
    alone, together = [], generate_job.sample_together
    monkeypatch.setattr(
        generate_job, "sample_together", lambda requests, jobs: alone.append(len(requests)) or together(requests, jobs)
    )

    def broken(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PipelineBatch, "step", broken)
    requests = mixed(3)
    for request, news in zip(requests, sampled(requests)):
        check(pipe, request, news)
    assert alone == [1, 1, 1] and is_idle()


def test_other_work_waits_for_one_turn_of_everybody(pipe, monkeypatch):
    """Whoever asks for something else is not passed over by requests that could still join."""
    ended, finish = [], Intake.finish
    monkeypatch.setattr(
        Intake, "finish", lambda self, request, result: ended.append(request.client) or finish(self, request, result)
    )

    async def scenario():
        async def tokenize():
            LocalContext.request.set(SimpleNamespace(session_hash="other"))
            [item async for item in follow(lambda job: ended.append("other"))]

        gate = threading.Event()
        worker._workers[0]._thread.submit(gate.wait, LIMIT)
        tasks = [asyncio.create_task(news_of(GenerateRequest("tiny", "a red apple", 4, n), f"a{n}")) for n in range(2)]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(tokenize()))
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(news_of(GenerateRequest("tiny", "a red apple", 4, n), f"b{n}")) for n in range(6)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.wait_for(asyncio.gather(*tasks), LIMIT)

    asyncio.run(scenario())
    assert {*ended[:2]} == {"a0", "a1"} and ended[2] == "other" and len(ended) == 9


def test_partial_images_come_as_often_as_asked(pipe):
    request = GenerateRequest("tiny", "a red apple", 2, 4, decoding="ar", partial_images=3)
    [news] = sampled([request])
    check(pipe, request, news)
    assert len(news[-1].partials) == 3 and all(len(images) == 2 for images in news[-1].partials)


def test_many_requests_leave_nothing_behind(pipe, steps):
    """No row, request or key stays in the worker, and every image is there."""
    found = sampled([GenerateRequest("tiny", "a", 1, seed, decoding="ar") for seed in range(200)])
    assert all(len(news[-1].images) == 1 for news in found) and is_idle()
    device_worker = worker._workers[0]
    assert not device_worker._queue._waiting and not device_worker._running
    assert max(steps) == 8 and np.mean(steps) > 6
