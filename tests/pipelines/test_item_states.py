"""Replaced text states: which positions change, which prompts are refused, and what the image makes of it."""

import pytest
import torch

from studio import StudioError, isolated_items, replaced_states
from studio.pipelines.item_states import token_span

STATES = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
DONOR = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))


def test_only_the_spans_change():
    found = replaced_states(STATES, [(4, 5), (1, 3)], DONOR)
    kept = [0, 3, 5]
    assert torch.equal(found[:, kept], STATES[:, kept]) and torch.equal(found[:, [1, 2, 4]], DONOR[:, [1, 2, 4]])
    assert torch.equal(replaced_states(STATES, [(1, 5)], STATES), STATES), "the own states change nothing"
    moved = replaced_states(STATES[0], [(3, 5)], DONOR[0], first=1)
    assert torch.equal(moved[3:5], DONOR[0, 1:3]) and torch.equal(moved[:3], STATES[0, :3])


@pytest.mark.parametrize("spans", [[(0, 7)], [(2, 2)], [(-1, 2)], [(0, 3), (2, 4)]])
def test_spans_that_are_none_are_refused(spans):
    with pytest.raises(StudioError, match="Spans are"):
        replaced_states(STATES, spans, DONOR)


def test_shapes_and_places_are_checked():
    with pytest.raises(StudioError, match="one shape"):
        replaced_states(STATES, [(0, 1)], DONOR[:, :5])
    with pytest.raises(StudioError, match="one span"):
        replaced_states(STATES, [(0, 1), (2, 3)], DONOR, first=1)
    with pytest.raises(StudioError, match="Spans are"):
        replaced_states(STATES, [(0, 3)], DONOR, first=4)


def test_items_are_found_by_their_tokens(tiny_pipeline):
    assert token_span(tiny_pipeline, "a red apple", "red apple") == (1, 3)
    with pytest.raises(StudioError, match="not"):
        token_span(tiny_pipeline, "a red apple", "green apple")
    with pytest.raises(StudioError, match="more than once"):
        token_span(tiny_pipeline, "a red apple a red apple", "red")


def test_an_isolated_item_has_its_own_states_and_others_keep_theirs(tiny_pipeline):
    prompt, item = "a red apple", "apple"
    plain, _ = tiny_pipeline.encode_prompt(prompt)
    alone, _ = tiny_pipeline.encode_prompt(item)
    with isolated_items(tiny_pipeline, item):
        repaired, _ = tiny_pipeline.encode_prompt([prompt, "a red"])
    assert torch.equal(repaired[0, 2], alone[0, 0]) and not torch.equal(repaired[0, 2], plain[0, 2])
    others = [0, 1, *range(3, plain.shape[1])]
    assert torch.equal(repaired[0, others], plain[0, others])
    assert torch.equal(repaired[1], tiny_pipeline.encode_prompt(["a red apple", "a red"])[0][1])
    assert torch.equal(tiny_pipeline.encode_prompt(prompt)[0], plain), "afterwards the encoding is the plain one"
    with pytest.raises(StudioError, match="Items are words"), isolated_items(tiny_pipeline):
        pass


def test_the_tokens_follow_the_replaced_span(tiny_pipeline):
    """A prompt that is the item keeps its tokens. Control: with the wrong span they change."""

    def tokens(prompt, *items):
        generator = torch.Generator().manual_seed(0)
        if not items:
            return tiny_pipeline(prompt, generator=generator, guidance_scale=3.0).tokens
        with isolated_items(tiny_pipeline, *items):
            return tiny_pipeline(prompt, generator=generator, guidance_scale=3.0).tokens

    assert torch.equal(tokens("a red apple", "a red apple"), tokens("a red apple"))
    assert not torch.equal(tokens("a red apple", "apple"), tokens("a red apple"))
