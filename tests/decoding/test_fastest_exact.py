"""Plain or Jacobi decoding by their seconds: the same tokens, what is timed, and what is kept."""

import json

import pytest
import torch

from studio import FastestExact, StudioError
from studio.decoding import fastest_exact as choice
from studio.decoding.autoregressive import autoregressive
from studio.decoding.fastest_exact import fastest_exact
from tests.decoding.test_speculative import conditions, streams, tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    return tmp_path / "decodings"


@pytest.fixture
def seconds(monkeypatch):
    """What the two seem to take; the tokens are still their own."""
    told = {"autoregressive": 1.0, "jacobi": 2.0}
    for name in told:
        loop = getattr(choice, name)

        def timed(*arguments, loop=loop, name=name, **options):
            sampled = loop(*arguments, **options)
            sampled.seconds["decode"] = told[name]
            return sampled

        monkeypatch.setattr(choice, name, timed)
    return told


def run(model, batch=3, **call):
    labels = {"class_labels": conditions(False)["class_labels"][:batch]}
    return fastest_exact(model, labels, generators=streams(1, 2, 3)[:batch], guidance_scale=2.0, **call)


def test_both_are_timed_and_then_the_faster_one_is_taken(seconds, cache):
    model = tiny()
    plain = autoregressive(model, conditions(False), generators=streams(1, 2, 3), guidance_scale=2.0)
    taken = []
    for _ in range(8):
        sampled = run(model)
        taken.append(sampled.decoding)
        assert torch.equal(sampled.tokens, plain.tokens)
    assert taken == ["ar", "jacobi"] * 3 + ["ar", "ar"]
    seconds["jacobi"] = 0.5
    again = tiny()
    assert run(again).decoding == "ar", "another process knows what was timed"
    assert [run(again, batch=2).decoding for _ in range(8)] == ["ar", "jacobi"] * 3 + ["jacobi", "jacobi"]
    assert len(list(cache.iterdir())) == 2
    assert run(tiny(seed=1)).decoding == "ar" and len(list(cache.iterdir())) == 3, "other weights are another model"
    kept = [json.loads(file.read_text()) for file in cache.iterdir()]
    assert all(set(each) == {"seconds", "window"} for each in kept)


def test_what_is_stopped_is_not_timed_and_callbacks_are_not_counted(cache, monkeypatch):
    run(tiny(), on_step=lambda index, tokens: index == 4)
    assert not cache.exists()

    def slow(index, tokens):
        if index == 3:
            clock[0] += 100.0

    clock = [0.0]
    real = choice.time.perf_counter
    monkeypatch.setattr(choice.time, "perf_counter", lambda: real() + clock[0])
    run(tiny(), on_step=slow)
    [file] = cache.iterdir()
    assert json.loads(file.read_text())["seconds"]["ar"][0] < 50


def test_a_cache_that_cannot_be_used_keeps_nothing_from_working(cache):
    cache.write_text("no folder")
    model = tiny()
    assert [run(model).decoding for _ in range(2)] == ["ar", "jacobi"]


def test_only_float32_has_a_choice(cache):
    assert run(tiny().bfloat16()).decoding == "ar" and run(tiny().bfloat16()).decoding == "ar"
    assert run(tiny(), settings=FastestExact(weights="int8")).decoding == "ar"
    assert not cache.exists()
    with pytest.raises(StudioError, match="weights"):
        FastestExact(weights="int4")
