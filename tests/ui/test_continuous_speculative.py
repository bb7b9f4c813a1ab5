"""Requests with drafts that join and leave a running batch of the tiny pipeline, next to others without."""

import numpy as np
import pytest
import torch

from studio import StudioError, decoding_named
from studio.decoding.lantern import Lantern
from studio.ui.jobs.generate_job import Sampled
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server import worker
from studio.ui.server.models import Device
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.worker import DeviceWorker
from tests.ui.test_continuous import (
    SETTINGS,
    WORDS,
    in_running_batches,
    is_idle,
    news_of_those_who_stay,
    sampled,
    sizes_of_steps,
)

DECODINGS = [
    ("speculative", {"drafts": "own"}),
    ("ar", {}),
    ("lantern", {"k": 20, "delta": 0.2, "drafts": "own"}),
    ("lantern++", {"k": 9, "drafts": "own"}),
    ("speculative", {"guidance_schedule": "linear", "drafts": "own"}),
]


@pytest.fixture
def pipe(tiny_pipeline, monkeypatch):
    return in_running_batches(tiny_pipeline, monkeypatch)


@pytest.fixture
def steps(pipe, monkeypatch):
    """The number of images of each call of a step."""
    return sizes_of_steps(monkeypatch, "sizes")


def mixed(count):
    """Requests that differ in everything."""
    return [
        GenerateRequest("tiny", f"a {WORDS[number % 3]} apple", 1 + number % 3, 10 * number,
                        **SETTINGS[number % len(SETTINGS)], decoding=decoding, options=options)
        for number in range(count) for decoding, options in [DECODINGS[number % len(DECODINGS)]]
    ]  # fmt: skip


def check(pipe, request, news):
    """The result is what a call alone samples."""
    assert isinstance(news, list), news
    found, settings = news[-1], decoding_named(request.decoding).settings(**request.options)
    assert isinstance(found, Sampled) and len(found.images) == request.count
    assert found.stats.tokens == 16 * request.count and found.prompt_tokens == 3
    for seed, image in zip(request.seeds, found.images):
        generator = torch.Generator().manual_seed(seed)
        expected = pipe(request.prompt, generator=generator, decoding=settings, **request.settings).images[0]
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_requests_that_differ_in_everything_share_steps(pipe, steps):
    requests = mixed(15)
    for request, news in zip(requests, sampled(requests)):
        check(pipe, request, news)
    assert max(map(sum, steps)) in (7, 8) and is_idle()
    assert max(map(len, steps)) == 2 and len(steps) < 16 * sum(request.count for request in requests) / 4


def test_drafts_are_told_as_those_of_a_call_alone(pipe, monkeypatch):
    """Though images that are whole leave before the others, and requests with equal settings draft together."""
    settings = {"temperature": 0.2, "guidance_scale": 1.0, "decoding": "speculative", "options": {"drafts": "own"}}
    alike = [GenerateRequest("tiny", "a red apple", 2 + seed % 2, seed, **settings) for seed in (3, 30, 61)]
    found = [news[-1].trace for news in sampled([*alike, *mixed(4)])[:3]]
    monkeypatch.setattr(worker, "_workers", [DeviceWorker(Device(), QueueLimits(max_batch=8))])
    for request, trace in zip(alike, found):
        [alone] = sampled([request])
        assert trace == alone[-1].trace and trace.sampled == 16
    assert any(trace.accepted for trace in found) and any(trace.rejected for trace in found)


def test_who_leaves_frees_its_rows_and_changes_nobody(pipe, steps, monkeypatch):
    requests = [
        GenerateRequest(
            "tiny", "a red apple", 2, seed, decoding="speculative", options={"drafts": "own"}, **SETTINGS[1]
        )
        for seed in (5, 50, 90)
    ]
    for request, news in zip(requests[::2], news_of_those_who_stay(requests, steps, monkeypatch)):
        check(pipe, request, news)
    assert max(steps) == [6] and [4] in steps[:8]


def test_a_request_that_fails_fails_alone(pipe, steps, monkeypatch):
    rule = Lantern.rule

    def broken(self, codebook):
        if self.k == 13:
            raise RuntimeError("no neighbours")
        return rule(self, codebook)

    monkeypatch.setattr(Lantern, "rule", broken)
    good, empty, many, none, small = (
        GenerateRequest("tiny", prompt, 1, 3, decoding=decoding, options=options, size=size)
        for prompt, decoding, options, size in (
            ("a red apple", "speculative", {}, None),
            (" ", "speculative", {}, None),
            ("a red apple", "lantern", {"k": 1000}, None),
            ("a red apple", "lantern", {"k": 13}, None),
            ("a red apple", "speculative", {}, "9x9"),
        )
    )
    found = sampled([good, empty, many, none, small])
    check(pipe, good, found[0])
    assert isinstance(found[1], StudioError) and "prompt is empty" in str(found[1])
    assert "k must be below that, not 1000" in str(found[2]) and "no neighbours" in str(found[3])
    assert "16x16" in str(found[4]) and len(steps) <= 16 and is_idle()


def test_partial_images_come_as_often_as_asked(pipe):
    request = GenerateRequest(
        "tiny", "a red apple", 2, 4, decoding="lantern++", partial_images=3, options={"k": 9, "drafts": "own"}
    )
    [news] = sampled([request])
    check(pipe, request, news)
    assert 1 <= len(news[-1].partials) <= 3 and all(len(images) == 2 for images in news[-1].partials)
