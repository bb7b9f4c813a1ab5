"""A model that was pruned is as it was before, whatever happened inside, and may be called in every way."""

import functools
import inspect

import pytest
import torch

from studio.pruning.api import prune, prune_inputs
from tests.pruning.tiny_families import FAMILIES, ROWS, answer, rare, reads_attention, tiny


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@rare(FAMILIES)
def test_nothing_is_left_behind(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    plain, before = answer(model, inputs), set(model.__dict__)
    hooks = hooks_of(model)
    with pytest.raises(RuntimeError, match="mine"), prune(model, "divprune", keep=0.3):
        answer(model, inputs)
        raise RuntimeError("mine")
    assert set(model.__dict__) == before
    assert hooks_of(model) == hooks
    again = answer(model, inputs)
    assert torch.equal(plain.sequences, again.sequences) and all(map(torch.equal, plain.logits, again.logits))


@reads_attention
def test_hooks_go_when_the_tower_fails(family):
    model, inputs = tiny(family).model, tiny(family).prompt()
    model(**inputs)
    before = hooks_of(model)
    with pytest.raises((RuntimeError, ValueError)):
        prune_inputs(model, {**inputs, "pixel_values": inputs["pixel_values"][..., :3]}, "hired")
    assert hooks_of(model) == before


def test_a_forward_on_the_instance_is_chained_and_restored():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    calls, original = [], model.forward

    @functools.wraps(original)
    def counted(*arguments, **keywords):
        calls.append(keywords["input_ids"].shape[1])
        return original(*arguments, **keywords)

    model.forward = counted
    try:
        with prune(model, "divprune", keep=0.5):
            assert "pixel_values" in inspect.signature(model.forward).parameters
            answer(model, inputs, tokens=2)
        assert model.forward is counted and calls[0] == inputs["input_ids"].shape[1] - 18
    finally:
        del model.forward


def test_blocks_may_be_nested():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    with prune(model, "divprune", keep=0.5) as outer:
        with prune(model, "divprune", keep=0.25) as inner:
            model.generate(**inputs, max_new_tokens=1)
        assert outer.info is None and inner.info.tokens_after == [9]
        model(**inputs)
        assert outer.info.tokens_after == [18]
    assert "forward" not in model.__dict__


def test_positional_arguments():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    ids, rest = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
    with prune(model, "divprune", keep=0.5):
        assert torch.equal(model(ids, **rest).logits, model(**inputs).logits)
        assert torch.equal(model.generate(ids, **rest, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3))


def test_the_base_model_alone():
    model, inputs = tiny("llava_next").model.model, tiny("llava_next").prompt()
    with prune(model, "divprune", keep=0.5) as record:
        assert model(**inputs).last_hidden_state.shape[1] == inputs["input_ids"].shape[1] - record.info.removed
