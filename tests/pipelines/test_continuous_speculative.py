"""Running batches of LlamaGen with drafts: calls with and without share it, and get what they would get alone."""

import random

import pytest
import torch

from studio import Autoregressive, LlamaGenPipeline, StudioError
from studio.decoding.drafts import NGram
from studio.decoding.eagle import AutoDrafts
from studio.decoding.fastest_exact import FastestExact
from studio.decoding.jacobi import Jacobi
from studio.decoding.lantern import Lantern, LanternPlusPlus
from studio.decoding.speculative import Speculative
from studio.models.drafter import Drafter
from tests.pipelines.test_continuous_masked import filters, generators, join, served

PROMPTS = ["a red apple", "a green pear", "blue sky", "apple on flat background", "a"]
DECODINGS = [
    Speculative(drafts=AutoDrafts()),
    Speculative(drafts=NGram()),
    Lantern(k=20, delta=0.2, drafts=AutoDrafts()),
    LanternPlusPlus(k=10, ratio=2.0, drafts=AutoDrafts(sampled=True)),
    Speculative(filter_order="lantern", drafts=AutoDrafts()),
    Autoregressive(),
    Jacobi(window=3),
]


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    """The tiny pipeline, with a drafter."""
    torch.manual_seed(1)
    drafter = Drafter.for_target(tiny_pipeline.transformer).eval()
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    parts = (getattr(tiny_pipeline, name) for name in ("image_tokenizer", "transformer", "text_encoder", "tokenizer"))
    pipe = LlamaGenPipeline(*parts, drafter=drafter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixed_requests(count, seed=0):
    choose = random.Random(seed)
    return [
        {
            "prompt": choose.choice(PROMPTS),
            "seeds": [choose.randrange(10**6) for _ in range(choose.randint(1, 3))],
            "decoding": choose.choice(DECODINGS),
            "settings": {
                "guidance_scale": choose.choice([1.0, 2.0, 3.5, 7.5]),
                "temperature": (temperature := choose.choice([0.0, 0.7, 1.0])),
                **filters(temperature, choose.choice([0, 0, 9]), choose.choice([1.0, 1.0, 0.8])),
            },
        }
        for _ in range(count)
    ]


def alone(pipe, request):
    """What a call returns for these images alone."""
    call = {"decoding": request["decoding"], **request["settings"], "num_images_per_prompt": len(request["seeds"])}
    return pipe(request["prompt"], generator=generators(request), **call)


def test_60_mixed_requests_are_those_of_calls_alone(pipe):
    requests = mixed_requests(60)
    ends, _, sizes = served(pipe, requests)
    assert sum(len(each) == 2 for each in sizes) > 20 and 45 <= len(ends) < 60
    for number, call in ends.items():
        found, expected = call.output(), alone(pipe, requests[number])
        assert torch.equal(found.tokens, expected.tokens), number
        if isinstance(requests[number]["decoding"], Speculative):
            assert found.stats.target_calls == expected.stats.target_calls


def test_company_and_cost_of_a_call(pipe):
    batch, settings = pipe.new_batch(8), {"guidance_scale": 2.0, "temperature": 1.0}
    requests = [
        {"prompt": "a red apple", "seeds": seeds, "decoding": decoding, "settings": settings}
        for seeds, decoding in (([1, 2], DECODINGS[0]), ([3], DECODINGS[2]), ([4, 5, 6], DECODINGS[5]))
    ]
    calls = [join(batch, request) for request in requests]
    assert batch.sizes == [3, 3] and batch.room == 2 and [call.sampled for call in calls] == [1, 1, 1]
    seen = []
    while batch.size:
        batch.step()
        seen.append(calls[0].sampled)
        assert calls[0].tokens.shape == (2, calls[0].sampled)
    assert seen == sorted(seen) and seen[-1] == 16 and [call.largest_batch for call in calls] == [3, 3, 3]
    for call, request in zip(calls[:2], requests):
        found, expected = call.output().stats, alone(pipe, request).stats
        assert (found.target_calls, found.tokens) == (expected.target_calls, expected.tokens)
        assert found.mean_accepted_length == expected.mean_accepted_length
        assert {*found.seconds} == {"text", "prefill", "decode", "pixels", "total"}


def test_what_cannot_join_is_refused(pipe):
    batch, stream = pipe.new_batch(2), torch.Generator()
    plain = (
        Autoregressive(weights="plain"),
        FastestExact(weights="int8"),
        Jacobi(weights="plain"),
        Jacobi(coupling="none"),
    )
    for decoding in (*plain, Speculative(), Lantern(k=20, weights="plain", drafts=AutoDrafts())):
        with pytest.raises(StudioError, match="joins no running batch"):
            batch.join("a red apple", generators=[stream], decoding=decoding)
    with pytest.raises(StudioError, match="room for 2 images, not 3"):
        batch.join("a red apple", generators=[stream] * 3, decoding=Speculative(drafts=AutoDrafts()))
    with pytest.raises(StudioError, match="k must be below that"):
        batch.join("a red apple", generators=[stream], decoding=Lantern(k=1000, drafts=AutoDrafts()))
    assert batch.size == 0 and batch.step() == []
