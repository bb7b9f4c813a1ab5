"""Requests of masked models that join and leave a running batch of a tiny pipeline."""

import numpy as np
import pytest
import torch

from studio import StudioError, decoding_named
from studio.ui.jobs.generate_job import Sampled
from studio.ui.jobs.request import GenerateRequest
from tests.ui.test_continuous import WORDS, in_running_batches, is_idle, news_of_those_who_stay, sampled, sizes_of_steps

STEPS = (2, 4, 6, 9)


@pytest.fixture(params=["mar", "bridge", "resgen"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind, request, monkeypatch):
    """The app samples with a tiny masked pipeline."""
    return in_running_batches(request.getfixturevalue(f"tiny_{kind}_pipeline"), monkeypatch)


@pytest.fixture
def steps(pipe, monkeypatch):
    """The number of images of each step."""
    return sizes_of_steps(monkeypatch)


def mixed(kind, count):
    """Requests that differ in everything."""
    return [
        GenerateRequest("tiny", f"a {WORDS[number % 3]} apple", 1 + number % 3, 10 * number,
                        guidance_scale=(1.0, 2.0, 4.0)[number % 3], temperature=(1.0, 0.5)[number % 2], decoding=kind,
                        options={"steps": STEPS[number % len(STEPS)]})
        for number in range(count)
    ]  # fmt: skip


def check(pipe, request, news):
    """The result is what a call alone samples; of continuous tokens, up to rounding."""
    assert isinstance(news, list), news
    found, plain = news[-1], decoding_named(request.decoding).settings(**request.options)
    assert isinstance(found, Sampled) and len(found.images) == request.count
    assert found.stats.target_calls == request.options["steps"] and found.prompt_tokens == 3
    for seed, image in zip(request.seeds, found.images):
        generator = torch.Generator().manual_seed(seed)
        expected = pipe(request.prompt, generator=generator, decoding=plain, **request.settings).images[0]
        apart = np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max()
        assert apart <= (1 if request.decoding == "mar" else 0)


def test_requests_that_differ_in_everything_share_steps(pipe, kind, steps):
    requests = mixed(kind, 12)
    for request, news in zip(requests, sampled(requests)):
        check(pipe, request, news)
    images, alone = sum(request.count for request in requests), sum(request.options["steps"] for request in requests)
    assert max(steps) in (7, 8) and len(steps) < alone / 2 and images == 24 and is_idle()


def test_who_leaves_frees_its_rows_and_changes_nobody(pipe, kind, steps, monkeypatch):
    options = {"steps": 9}
    requests = [GenerateRequest("tiny", "a red apple", 2, seed, decoding=kind, options=options) for seed in (5, 50, 90)]
    for request, news in zip(requests[::2], news_of_those_who_stay(requests, steps, monkeypatch)):
        check(pipe, request, news)
    assert max(steps) == 6 and 4 in steps[:8]


def test_a_request_that_fails_fails_alone(pipe, kind, steps):
    good, empty, many, foreign, small = (
        GenerateRequest("tiny", prompt, 1, 3, decoding=decoding, options=options, size=size)
        for prompt, decoding, options, size in (
            ("a red apple", kind, {"steps": 4}, None),
            (" ", kind, {}, None),
            ("a red apple", kind, {"steps": 1000}, None),
            ("a red apple", "ar", {}, None),
            ("a red apple", kind, {}, "9x9"),
        )
    )
    found = sampled([good, empty, many, foreign, small])
    check(pipe, good, found[0])
    assert isinstance(found[1], StudioError) and "prompt is empty" in str(found[1])
    assert (
        "steps, not 1000" in str(found[2])
        and "not Autoregressive" in str(found[3])
        and "leave size out" in str(found[4])
    )
    assert len(steps) == 4 and is_idle()


def test_partial_images_come_as_often_as_asked(pipe, kind):
    request = GenerateRequest("tiny", "a red apple", 2, 4, decoding=kind, options={"steps": 9}, partial_images=3)
    [news] = sampled([request])
    check(pipe, request, news)
    assert len(news[-1].partials) == 3 and all(len(images) == 2 for images in news[-1].partials)
    shares = [np.asarray(images[0].getchannel("A")).mean() / 255 for images in news[-1].partials]
    assert shares == sorted(shares) and 0 < shares[0] < 1


@pytest.mark.parametrize(
    ("decoding", "options", "joins"),
    [
        ("mar", {}, True),
        ("mar", {"order": "gtr", "annealing": "linear"}, True),
        ("mar", {"cache": "lazy"}, False),
        ("cspd", {}, False),
        ("bridge", {}, True),
        ("resgen", {}, True),
        ("first-hitting", {}, True),
        ("xar", {}, False),
        ("rq", {}, False),
        ("exact", {}, True),
        ("jacobi", {"coupling": "gumbel"}, False),
        ("speculative", {"drafts": "own"}, True),
        ("speculative", {}, False),
        ("lantern", {"k": 9, "drafts": "own"}, True),
        ("lantern", {"k": 9}, False),
        ("lantern++", {"drafts": "own"}, True),
    ],
)
def test_which_requests_may_join(decoding, options, joins):
    assert GenerateRequest("tiny", "x", decoding=decoding, options=options).joins == joins
