"""What goes on behind a short prompt, and inputs that are not the usual ones: masks, positions, features."""

from contextlib import nullcontext

import pytest
import torch

from studio.errors import StudioError
from studio.pruning.api import prune, prune_inputs
from tests.pruning.tiny_families import (
    FAMILIES,
    ROWS,
    answer,
    dropped_mask,
    rare,
    three_axes,
    tiny,
    whole_positions,
)

TOLERANCE = dict(atol=2e-5, rtol=1e-4)
one_axis = rare([family for family in FAMILIES if family not in three_axes])


@one_axis
def test_a_conversation_goes_on_behind_the_short_prompt(family):
    model, inputs = tiny(family).model, tiny(family).prompt(((0,),))
    question = torch.tensor([[5, 6, 7]])
    with prune(model, "divprune", keep=0.3, positions="compact", restore_prompt=False):
        first = answer(model, inputs)
        ids = torch.cat((first.sequences, question), dim=1)
        second = model.generate(input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    pruned, _ = prune_inputs(model, inputs, "divprune", keep=0.3, positions="compact")
    more = ids.shape[1] - pruned["input_ids"].shape[1]
    for name in {"token_type_ids", "mm_token_type_ids"} & set(pruned):
        pruned[name] = torch.nn.functional.pad(pruned[name], (0, more))
    pruned |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pruned.pop("position_ids")
    assert torch.equal(second, model.generate(**pruned, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("options", [{}, dict(positions="compact"), dict(restore_prompt=False)], ids=str)
def test_a_conversation_at_other_places_than_its_cache_is_refused(options):
    """Also where the answer is so long that the new ids are text alone."""
    model, inputs = tiny("llava").model, tiny("llava").prompt(((0,),))
    for tokens in (1, 40):
        with prune(model, "divprune", keep=0.3, **options) as record:
            first = answer(model, inputs, tokens)
            ids = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), dim=1)
            with pytest.raises(StudioError, match="restore_prompt=False and positions='compact'"):
                model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=1)
        assert record.info.removed > 20


def test_a_conversation_goes_on_where_nothing_was_pruned():
    model, inputs = tiny("llava").model, tiny("llava").prompt(((0,),))
    found = []
    for keep in (None, 1.0):
        with nullcontext() if keep is None else prune(model, "divprune", keep=keep):
            first = answer(model, inputs)
            ids = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), dim=1)
            found.append(model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False))
    assert torch.equal(*found)


def test_a_conversation_on_three_axes_goes_on_at_original_positions():
    """As behind a prompt whose pruned tokens are masked."""
    model, inputs = tiny("qwen2_5_vl").model, tiny("qwen2_5_vl").prompt(((0,),))
    question = torch.tensor([[5, 6, 7]])
    with prune(model, "divprune", keep=0.3, restore_prompt=False) as record:
        first = answer(model, inputs)
        ids = torch.cat((first.sequences, question), dim=1)
        second = answer(model, {"input_ids": ids}, past_key_values=first.past_key_values)
    said = torch.cat((first.sequences[:, -4:], question), dim=1)
    whole = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    whole["input_ids"] = torch.cat((inputs["input_ids"], said), dim=1)
    whole["attention_mask"] = torch.cat((dropped_mask(model, inputs, record.info), torch.ones_like(said)), dim=1)
    more = torch.arange(said.shape[1]) + record.info.next_positions[:, None]
    places = whole_positions(model, inputs)[-3:]
    positions = torch.cat((places, more.expand(3, -1, -1)), dim=2)
    expected = model(**whole, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(second.logits[0], expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "vscan"])
def test_padding_is_found_without_a_mask(method, side):
    """Control: where the end is the padding, transformers and we take it for text."""
    model, inputs = tiny("llava").model, tiny("llava").prompt(ROWS, side=side)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with prune(model, method, keep=0.3, **({} if method == "divprune" else dict(after_layer=1))):
        expected, found = answer(model, inputs), answer(model, bare)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(map(torch.equal, found.logits, expected.logits))
        blind = answer(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, eos_token_id=[0])
        assert all(map(torch.equal, answer(model, bare, eos_token_id=[0]).logits, blind.logits))
    assert not torch.equal(blind.logits[0], expected.logits[0])


def test_features_in_place_of_pixels_are_refused():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    pruned, _ = prune_inputs(model, inputs, "divprune", keep=0.5)
    with prune(model, "divprune", keep=0.5), pytest.raises(StudioError, match="Features in place of pixels"):
        model.generate(**pruned, max_new_tokens=2)


def test_a_mask_that_is_no_tensor_is_refused():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    inputs["attention_mask"] = {"full_attention": None}
    with pytest.raises(StudioError, match="must be a tensor of the shape of input_ids, not a dict"):
        prune_inputs(model, inputs, "divprune", keep=0.5)


@pytest.mark.parametrize("rows", [((0,),), ROWS])
def test_positions_of_text_are_those_of_all_axes(rows):
    model, inputs = tiny("qwen2_5_vl").model, tiny("qwen2_5_vl").prompt(rows)
    flat = torch.arange(inputs["input_ids"].shape[1])[None]
    found = [
        prune_inputs(model, {**inputs, "position_ids": given}, "divprune", keep=0.4)[0]["position_ids"]
        for given in (flat, flat.expand(len(rows), -1), flat.expand(3, len(rows), -1))
    ]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
