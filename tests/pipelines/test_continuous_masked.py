"""Running batches of masked models: tokens do not depend on company, nor on when a call joined or who left."""

import copy
import random
import statistics

import pytest
import torch

from studio import StudioError, decoding_named
from studio.decoding.mar import MARSampler
from studio.decoding.resgen import ResGenSampler
from studio.decoding.token_bridge import DimensionWiseSampler

KINDS = {"mar": MARSampler, "bridge": DimensionWiseSampler, "resgen": ResGenSampler}
PROMPTS = ["a red apple", "a green pear", "blue sky", "apple on flat background", "a"]
OPTIONS = {
    "mar": {
        "steps": [1, 3, 4, 7, 16],
        "diffusion_steps": [2, 4, 4, 4],
        "order": ["random", "random", "gtr"],
        "annealing": ["none", "none", "linear"],
        "guidance_schedule": [None, None, "constant"],
    },
    "bridge": {"steps": [1, 2, 4, 5, 9], "guidance_schedule": [None, None, "constant"]},
    "resgen": {
        "steps": [1, 3, 4, 8, 20],
        "schedule": ["cosine", "circle", "arccos"],
        "guidance_schedule": [None, None, "constant"],
    },
}
FEWEST = {"gtr": 3}
EXACT = 1e-6
"""In standard deviations of continuous tokens."""
FLOAT32 = 5e-2
"""The same in float32, where the first denoising steps multiply what sums are rounded by, by ten thousand."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind, request):
    """A tiny pipeline; in float64, where tokens are continuous, so that rounding hides nothing."""
    pipe = request.getfixturevalue(f"tiny_{kind}_pipeline")
    pipe.set_progress_bar_config(disable=True)
    if kind == "mar":
        pipe = copy.deepcopy(pipe)
        pipe.transformer.double()
    return pipe


def filters(temperature, top_k, top_p):
    """These, or none at temperature 0, where they are refused."""
    return {"top_k": top_k, "top_p": top_p} if temperature else {}


def mixed_requests(kind, count, seed=0):
    """Requests of any kind: prompts, seeds, guidance, temperatures, filters, steps, one to three images."""
    choose, requests = random.Random(seed), []
    for _ in range(count):
        options = {name: choose.choice(values) for name, values in OPTIONS[kind].items()}
        settings = {
            "guidance_scale": choose.choice([1.0, 2.0, 3.5, 7.5]),
            "temperature": choose.choice([0.0, 0.7, 1.0]),
        }
        if kind == "mar" and options["order"] == "gtr":
            options["steps"] = max(options["steps"], FEWEST["gtr"])
        if kind != "mar":
            settings |= filters(settings["temperature"], choose.choice([0, 0, 3]), choose.choice([1.0, 1.0, 0.8]))
        if settings["guidance_scale"] == 1:
            options["guidance_schedule"] = None
        name = choose.choice(["resgen", "first-hitting"]) if kind == "resgen" else kind
        requests.append(
            {
                "prompt": choose.choice(PROMPTS),
                "seeds": [choose.randrange(10**6) for _ in range(choose.randint(1, 3))],
                "decoding": decoding_named(name).settings(**options),
                "settings": settings,
            }
        )
    return requests


def generators(request):
    return [torch.Generator().manual_seed(seed) for seed in request["seeds"]]


def join(batch, request):
    call = {"decoding": request["decoding"], **request["settings"]}
    return batch.join(request["prompt"], generators=generators(request), **call)


def alone(pipe, request):
    """The tokens of a call for these images alone."""
    call = {"decoding": request["decoding"], **request["settings"], "output_type": "tokens"}
    return pipe([request["prompt"]] * len(request["seeds"]), generator=generators(request), **call).tokens


def off(found, expected):
    """How far tokens are off: 0 or infinity for codes; of continuous ones, in their standard deviations."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    return float((found - expected).abs().max() / expected.std())


def served(pipe, requests, seed=1):
    """Serves all requests in a batch of up to eight images; those that leave halfway are left out.

    Returns:
        Calls by the number of the request, how many requests shared each step, and the sizes of its calls.
    """
    choose, batch = random.Random(seed), pipe.new_batch(8)
    waiting, under_way, ends, shared, sizes = list(enumerate(requests)), {}, {}, [], []
    while waiting or under_way:
        while waiting and batch.room >= len(waiting[0][1]["seeds"]) and choose.random() < 0.7:
            number, request = waiting.pop(0)
            under_way[join(batch, request)] = number
        if under_way and choose.random() < 0.04:
            call = choose.choice(list(under_way))
            batch.leave(call)
            del under_way[call]
        assert batch.size == sum(batch.sizes) <= 8
        shared.append(len(under_way))
        sizes.append(batch.sizes)
        for call in batch.step():
            ends[under_way.pop(call)] = call
    assert batch.size == 0 and batch.room == 8
    return ends, shared, sizes


def differences(pipe, requests, ends):
    """How far the tokens of each request are off from those of a call alone."""
    return [off(call.tokens, alone(pipe, requests[number])) for number, call in ends.items()]


def test_60_mixed_requests_are_those_of_calls_alone(pipe, kind):
    requests = mixed_requests(kind, 60)
    ends, shared, _ = served(pipe, requests)
    assert max(shared) >= 5 and len({*shared}) >= 5 and 45 <= len(ends) < 60
    assert max(differences(pipe, requests, ends)) < EXACT


def test_continuous_tokens_in_float32_are_equal_up_to_rounding(tiny_mar_pipeline):
    requests = mixed_requests("mar", 60)
    ends, _, _ = served(tiny_mar_pipeline, requests)
    found = differences(tiny_mar_pipeline, requests, ends)
    assert statistics.median(found) < EXACT and max(found) < FLOAT32


def test_a_wrong_row_would_be_noticed(pipe, kind, monkeypatch):
    """The negative control: what the transformer says about one request, taken for the next."""
    predict = KINDS[kind].predict

    def swapped(self, runs):
        found = predict(self, runs)
        pairs = [n for n in range(1, len(runs)) if [p.shape for p in found[n]] == [p.shape for p in found[n - 1]]]
        for n in pairs[:1]:
            found[n], found[n - 1] = found[n - 1], found[n]
        return found

    monkeypatch.setattr(KINDS[kind], "predict", swapped)
    requests = mixed_requests(kind, 20)
    ends, _, _ = served(pipe, requests)
    monkeypatch.undo()
    assert max(differences(pipe, requests, ends)) > FLOAT32


def test_a_call_of_the_transformer_is_shared(pipe, kind, monkeypatch):
    """Requests with other numbers of steps, guided or not, take as many calls as the longest of them."""
    calls, predict = [], KINDS[kind].predict
    monkeypatch.setattr(KINDS[kind], "predict", lambda self, runs: calls.append(len(runs)) or predict(self, runs))
    passes = count_passes(pipe, monkeypatch)
    batch = pipe.new_batch(8)
    found = [
        batch.join("a red apple", generators=generators({"seeds": [1, 2]}), guidance_scale=scale,
                   decoding=decoding_named(kind).settings(steps=steps))
        for scale, steps in ((1.0, 2), (3.0, 5), (2.0, 3))
    ]  # fmt: skip
    ended = [call for _ in range(5) for call in batch.step()]
    assert calls == [3, 3, 2, 1, 1] and len(passes) == 5 and batch.size == 0
    assert ended == [found[0], found[2], found[1]] and [call.largest_batch for call in found] == [6, 6, 6]


def count_passes(pipe, monkeypatch):
    """A list that grows with each pass through the last block of the transformer."""
    passes, model = [], pipe.transformer
    blocks = model.blocks if hasattr(model, "blocks") else model.decoder_blocks
    monkeypatch.setattr(
        blocks[-1], "forward", lambda *given, forward=blocks[-1].forward: passes.append(1) or forward(*given)
    )
    return passes


def test_progress_and_cost_of_a_call(pipe, kind):
    request = {**mixed_requests(kind, 1)[0], "seeds": [3, 4], "decoding": decoding_named(kind).settings(steps=4)}
    seen, batch = [], pipe.new_batch(2)
    call = join(batch, request)
    assert call.sampled == 0 and not call.known.any()
    while batch.size:
        batch.step()
        seen.append((call.sampled, int(call.known.sum())))
    one = pipe(request["prompt"], generator=generators(request)[0], decoding=request["decoding"], **request["settings"])
    stats, total = call.output().stats, pipe.transformer.num_tokens
    assert seen == sorted(seen) and seen[-1] == (total, 2 * total) and seen[0][0] > 0
    assert (stats.target_calls, stats.tokens) == (one.stats.target_calls, 2 * one.stats.tokens)
    assert stats.mean_accepted_length == one.stats.mean_accepted_length
    assert {*stats.seconds} == {"text", "prefill", "decode", "pixels", "total"} and stats.decoding is None


def test_what_cannot_join_is_refused(tiny_mar_pipeline):
    batch, stream = tiny_mar_pipeline.new_batch(2), torch.Generator()
    for name, options in (("cspd", {}), ("mar", {"cache": "lazy"})):
        decoding = decoding_named(name).settings(**options)
        with pytest.raises(StudioError, match="joins no running batch"):
            batch.join("a red apple", generators=[stream], decoding=decoding)
    plain = decoding_named("mar").settings()
    with pytest.raises(StudioError, match="room for 2 images, not 3"):
        batch.join("a red apple", generators=[stream] * 3, decoding=plain)
    with pytest.raises(StudioError, match="max_images"):
        tiny_mar_pipeline.new_batch(0)
    assert batch.size == 0 and batch.step() == []


def test_schedules_of_many_requests_are_not_kept(tiny_mar_pipeline):
    batch = tiny_mar_pipeline.new_batch(1)
    for steps in range(1, 41):
        decoding = decoding_named("mar").settings(steps=1, diffusion_steps=steps)
        batch.join("a red apple", generators=[torch.Generator().manual_seed(1)], decoding=decoding)
        assert len(batch.step()) == 1
    assert len(batch.sampler.heads.known) == 32 and batch.size == 0
