"""What becomes of drafted tokens, by hand and on a real pipeline."""

import dataclasses

import pytest
import torch

from studio import DECODINGS, decodings_for
from studio.ui.jobs.draft_trace import DraftTrace, Round, trace_drafts
from studio.ui.jobs.generate_job import Call
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Sketch
from studio.ui.render.token_grid import token_grid

TREE = {"parents": [-1, 0, 0, 1], "depths": [0, 1, 1, 2]}


def test_accepted_paths_and_rejected_siblings():
    rounds = [Round(1, [5, 6, 7, 8], **TREE), Round(4, [9, 1, 2, 3], **TREE)]
    trace = trace_drafts(rounds, [5, 6, 8, 9, 2, 4], 6)
    assert trace == DraftTrace(6, 6, frozenset({1, 2, 4}), {1: 1, 4: 1, 5: 1})


def test_the_latest_round_counts_when_the_next_begins():
    rounds = [Round(1, [5, 6, 7, 8], **TREE), Round(2, [9, 1, 2, 3], **TREE)]
    assert trace_drafts(rounds, [5, 9, 1], 6) == DraftTrace(6, 2, frozenset(), {1: 2, 2: 1})
    assert trace_drafts([], [5], 6) == DraftTrace(6, 1)


def test_an_image_that_others_wait_for_is_told_as_far_as_it_is_shown():
    rounds = [Round(1, [5, 6, 7, 8], **TREE), Round(4, [9, 1, 2, 3], **TREE)]
    assert trace_drafts(rounds, [5, 6], 6) == DraftTrace(6, 1)


@pytest.mark.parametrize(
    "decoding", [name for name in decodings_for("LlamaGenPipeline", ()) if name not in ("ar", "exact")]
)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_own_tokens_are_the_calls_of_the_model(tiny_pipeline, decoding, temperature):
    takes_k = any(option.name == "k" for option in DECODINGS[decoding].options)
    options = {"k": 8} if takes_k else {}
    request = GenerateRequest("tiny", "a red apple", 1, 3, temperature=temperature, decoding=decoding, options=options)
    call = Call(tiny_pipeline, request)
    output = call(lambda sketch: False)
    trace = call.trace(Sketch(output.tokens))
    assert trace.sampled == trace.total == 16
    assert trace.sampled - len(trace.accepted) == output.stats.target_calls


def test_the_first_image_of_each_wish_is_watched(tiny_pipeline):
    requests = [
        GenerateRequest("tiny", words, 2, 3, decoding="speculative") for words in ("a red apple", "a blue pear")
    ]
    call = Call(tiny_pipeline, *requests)
    sketch = Sketch(call(lambda sketch: False).tokens)
    for number, request in enumerate(requests):
        alone = Call(tiny_pipeline, request)
        assert call.trace(sketch, number) == alone.trace(Sketch(alone(lambda sketch: False).tokens))
    assert call.trace(sketch, 0) != call.trace(sketch, 1)


def test_watching_changes_nothing(tiny_pipeline):
    request = GenerateRequest("tiny", "a red apple", 2, 3, decoding="speculative")
    traced = Call(tiny_pipeline, request)(lambda sketch: False)
    plain = tiny_pipeline(
        request.prompt,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
        decoding=DECODINGS["speculative"].settings(),
    )
    assert torch.equal(traced.tokens, plain.tokens)


def test_drafts_of_lantern_that_are_jacobi_guesses_are_seen(tiny_pipeline):
    options = {"k": 8, "drafts": "jacobi", "delta": 0.9}
    call = Call(tiny_pipeline, GenerateRequest("tiny", "a red apple", 1, 3, decoding="lantern", options=options))
    output = call(lambda sketch: False)
    trace = call.trace(Sketch(output.tokens))
    assert trace.sampled - len(trace.accepted) == output.stats.target_calls and trace.accepted
    assert max(trace.rejected) < 16


def test_the_faster_of_two_shows_drafts_where_it_makes_any(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    seen = {}
    for _ in range(2):
        call = Call(tiny_pipeline, GenerateRequest("tiny", "a red apple", 1, 3, decoding="exact", temperature=0.99))
        output = call(lambda sketch: False)
        seen[output.stats.decoding] = call.trace(Sketch(output.tokens))
    assert seen["ar"] is None and seen["jacobi"].sampled == 16


def test_the_grid_samples_and_says_the_numbers():
    trace = DraftTrace(16, 10, frozenset({1, 2}), {4: 3, 9: 1})
    grid = token_grid(trace, "Tokens of <this>")
    assert grid.count("M") == 16 and grid.count("<circle") == 2
    assert 'aria-label="Tokens of &lt;this&gt;: 2 accepted drafts, 8 sampled by the model, 4 rejected drafts"' in grid
    assert token_grid(dataclasses.replace(trace, sampled=16), "x").count("M") == 16
