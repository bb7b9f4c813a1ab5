"""Speculative and Lantern through the pipeline: greedy equals plain decoding, batches, callbacks, stats."""

import pytest
import torch

from studio import StudioError
from studio.decoding.drafts import NGram
from studio.decoding.eagle import AutoDrafts
from studio.decoding.lantern import Lantern, LanternPlusPlus
from studio.decoding.speculative import Speculative


def drafted(k):
    """Decodings with drafts of every kind; relaxed ones take k codes."""
    return [
        Speculative(),
        Speculative(drafts=AutoDrafts()),
        Speculative(drafts=NGram()),
        Lantern(k, 0.2, drafts=AutoDrafts()),
        LanternPlusPlus(k=k, drafts=AutoDrafts(sampled=True)),
    ]


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipe(tiny_pipeline):
    tiny_pipeline.set_progress_bar_config(disable=True)
    return tiny_pipeline


def test_greedy_images_are_those_of_plain_decoding(pipe):
    call = {"guidance_scale": 3.0, "temperature": 0.0, "num_images_per_prompt": 2}
    plain = pipe("a red apple", **call)
    fast = pipe("a red apple", decoding=Speculative(), **call)
    assert torch.equal(fast.tokens, plain.tokens)
    assert fast.images[0].tobytes() == plain.images[0].tobytes()
    assert fast.stats.target_calls <= 16 and fast.stats.tokens == 32
    assert fast.stats.mean_accepted_length >= 16 / fast.stats.target_calls
    assert set(fast.stats.seconds) == {"text", "prefill", "decode", "pixels", "total"}


@pytest.mark.parametrize("decoding", drafted(40))
def test_a_batch_equals_its_single_calls(pipe, decoding):
    prompts = ["a red apple", "blue sky"]
    settings = {"guidance_scale": 3.0, "top_k": 40, "decoding": decoding, "output_type": "tokens"}
    together = pipe(prompts, generator=streams(1, 2), **settings)
    alone = [pipe(prompts[row], generator=streams(row + 1), **settings) for row in range(2)]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in alone]))
    calls = [one.stats.target_calls for one in alone]
    assert together.stats.target_calls == max(calls)
    assert together.stats.mean_accepted_length == pytest.approx(32 / sum(calls))


def test_callback_sees_changes_and_interrupts(pipe):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        seen.append(kwargs["tokens"].shape[1])
        pipeline._interrupt = step == 4
        return {"tokens": torch.full_like(kwargs["tokens"], 7)}

    out = pipe("a red apple", generator=streams(0), decoding=Speculative(), callback_on_step_end=callback)
    assert seen == [1, 2, 3, 4, 5] and out.tokens.tolist() == [[7] * 5]
    assert pipe.interrupt and out.images[0].size == (16, 16)


def test_what_does_not_fit_is_refused(pipe):
    with pytest.raises(StudioError, match="64 codes"):
        pipe("a red apple", decoding=Lantern(1000, 0.1))
    with pytest.raises(StudioError, match="Lantern .* not str"):
        pipe("a red apple", decoding="lantern")
