"""A model that was pruned is as it was before, whatever happened inside, and may be called in every way."""

import functools
import inspect
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch

from studio.errors import StudioError
from studio.pruning.api import prune, prune_inputs
from studio.pruning.kv_cache import compress
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


BLOCKS = {
    "studio.prune before the language model": lambda model: prune(model, "divprune", keep=0.5),
    "studio.prune inside the language model": lambda model: prune(model, "fastv", keep=0.5, after_layer=1),
    "studio.compress": lambda model: compress(model, "coverage", keep=0.5),
}


@pytest.mark.parametrize("outer, inner", [*permutations(BLOCKS, 2)])
def test_blocks_of_two_kinds_are_not_nested(outer, inner):
    """One of another model is, and one in a thread of its own."""
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    model(**inputs)
    hooks = hooks_of(model)
    with BLOCKS[outer](model) as record:
        with pytest.raises(StudioError, match=f"^{inner} cannot open inside a block of {outer} on the same model"):
            BLOCKS[inner](model).__enter__()
        model(**inputs)
        assert record.info.tokens_after == [18]
        with BLOCKS[inner](tiny("llava_next").model) as other:
            tiny("llava_next").model(**tiny("llava_next").prompt())
        assert other.info is not None

        def elsewhere():
            with torch.no_grad(), BLOCKS[inner](model) as own:
                model(**inputs)
            return own.info.tokens_after

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(elsewhere).result() == [18]
    assert hooks_of(model) == hooks and not {"forward", "generate"} & set(model.__dict__)


def test_a_compressed_cache_of_a_pruned_prompt():
    """What the refusal of nested blocks advises."""
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    pruned, info = prune_inputs(model, inputs, "divprune", keep=0.5)
    with compress(model, "coverage", keep=0.5) as record:
        model(**pruned)
    assert info.tokens_after == record.info.tokens_before == [18] and record.info.tokens_after == [9]


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


def test_generating_in_a_block_of_the_base_model_is_refused():
    """`generate` encodes the image first, and the base model never sees pixels."""
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt()
    with prune(model.model, "divprune", keep=0.5), pytest.raises(StudioError, match="on the model that generates"):
        model.generate(**inputs, max_new_tokens=1)
    with prune(model, "divprune", keep=0.5):
        expected = model(**inputs).logits
    with prune(model.model, "divprune", keep=0.5):
        assert torch.equal(model(**inputs).logits, expected)
