"""Pruning on real transformers classes at tiny size, every family."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from studio.pruning.api import prune, prune_inputs
from studio.pruning.registry import METHODS
from tests.pruning import tiny_models
from tests.pruning.tiny_families import (
    FAMILIES,
    ROWS,
    answer,
    dropped_mask,
    every_family,
    rare,
    reads_attention,
    three_axes,
    tiny,
    whole_positions,
)

TOLERANCE = dict(atol=2e-5, rtol=1e-4)
one_axis = rare([family for family in FAMILIES if family not in three_axes])
on_three_axes = rare(three_axes)
with_attention = pytest.mark.parametrize("method", ["hired", "globalcom2"])


def new_tokens(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


@every_family
def test_keeping_all_is_bitwise_the_plain_model(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    plain, plain_logits = answer(model, inputs), model(**inputs).logits
    with prune(model, "divprune", keep=1.0) as record:
        pruned, logits = answer(model, inputs), model(**inputs).logits
    assert record.info.tokens_before == record.info.tokens_after
    assert torch.equal(plain.sequences, pruned.sequences)
    assert all(map(torch.equal, plain.logits, pruned.logits))
    assert torch.equal(plain_logits, logits)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_with_every_method(method):
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt(ROWS)
    plain = model(**inputs).logits
    with prune(model, method, keep=1.0):
        assert torch.equal(model(**inputs).logits, plain)


@every_family
def test_original_positions_are_those_of_masked_tokens(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    pruned, info = prune_inputs(model, inputs, "divprune", keep=0.2)
    mask, positions = dropped_mask(model, inputs, info), whole_positions(model, inputs)
    expected = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits
    found = model(**pruned).logits
    for row, logits, before in zip(range(len(mask)), found, expected):
        short, whole = logits[pruned["attention_mask"][row].bool()], before[mask[row].bool()]
        torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-5)
    masked = answer(model, {**inputs, "attention_mask": mask}, position_ids=positions)
    with prune(model, "divprune", keep=0.2):
        short = answer(model, inputs)
    assert torch.equal(masked.sequences, short.sequences)
    for ours, theirs in zip(short.logits, masked.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@one_axis
def test_compact_positions_are_those_of_a_short_prompt(family):
    model, inputs = tiny(family).model, tiny(family).prompt(((1,),))
    pruned, _ = prune_inputs(model, inputs, "divprune", keep=0.4, positions="compact")
    assert torch.equal(pruned["position_ids"], torch.arange(pruned["input_ids"].shape[1])[None])
    positions = pruned.pop("position_ids")
    torch.testing.assert_close(model(**pruned).logits, model(**pruned, position_ids=positions).logits, **TOLERANCE)


@on_three_axes
def test_compact_positions_on_three_axes(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    pruned, info = prune_inputs(model, inputs, "divprune", keep=0.4, positions="compact")
    assert (pruned["position_ids"] == pruned["position_ids"][0]).all()
    assert torch.equal(info.next_positions, pruned["attention_mask"].sum(1))
    with prune(model, "divprune", keep=0.4, positions="compact"):
        assert torch.isfinite(answer(model, inputs).logits[-1]).all()


@every_family
def test_the_cache_shrinks_and_the_prompt_comes_back(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    length = inputs["input_ids"].shape[1]
    with prune(model, "divprune", keep=0.25) as record:
        out = answer(model, inputs)
    assert out.past_key_values.get_seq_length() == length - record.info.removed + 4 - 1
    assert record.info.removed > length // 4
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"]) and out.sequences.shape[1] == length + 4
    assert record.info.tokens_after == [max(1, round(0.25 * tokens)) for tokens in record.info.tokens_before]
    with prune(model, "divprune", keep=0.25, restore_prompt=False):
        short = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert short.shape[1] == length - record.info.removed + 4
    assert torch.equal(short[:, -4:], new_tokens(out, inputs))


@every_family
def test_a_batch_of_beams_equals_its_rows(family):
    rows = ((0,), (1, 2), (2,))
    model, beams = tiny(family).model, 3
    options = dict(num_beams=beams, num_return_sequences=beams)
    whole = tiny(family).prompt(rows)
    with prune(model, "divprune", keep=0.4):
        batch = new_tokens(answer(model, whole, **options), whole).view(len(rows), beams, -1)
        for row, together in enumerate(batch):
            alone = one_row(tiny(family), whole, rows, row)
            out = answer(model, alone, **options)
            assert torch.equal(new_tokens(out, alone), together)
            assert torch.equal(out.sequences[:, : alone["input_ids"].shape[1]], alone["input_ids"].expand(beams, -1))


@rare(FAMILIES)
def test_logits_of_a_batch_are_those_of_its_rows(family):
    rows = ((0,), (1, 2), (2,))
    model, whole = tiny(family).model, tiny(family).prompt(rows)
    with prune(model, "divprune", keep=0.4):
        batch = answer(model, whole).logits
        for row in range(len(rows)):
            alone = answer(model, one_row(tiny(family), whole, rows, row)).logits
            for together, single in zip(batch, alone):
                torch.testing.assert_close(together[row], single[0], **TOLERANCE)


def one_row(made, inputs, rows, row):
    """Row `row` of a batch as a prompt of its own, without padding."""
    alone = made.prompt((rows[row],))
    real = inputs["attention_mask"][row].bool()
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            alone[name] = inputs[name][row, real][None]
    return alone


@every_family
def test_static_cache(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    with prune(model, "divprune", keep=0.4):
        dynamic, static = answer(model, inputs), answer(model, inputs, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)


@rare(FAMILIES)
def test_your_own_loop(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    with prune(model, "divprune", keep=0.4):
        expected = new_tokens(answer(model, inputs), inputs)
    pruned, info = prune_inputs(model, inputs, "divprune", keep=0.4)
    out, mask, tokens = model(**pruned, use_cache=True), pruned["attention_mask"], []
    for step in range(4):
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        positions = (info.next_positions + step)[:, None]
        if "image_grid_thw" in inputs:
            positions = positions.expand(3, -1, -1)
        out = model(
            input_ids=tokens[-1],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@on_three_axes
def test_three_axis_models_count_on_by_themselves(family):
    model, inputs = tiny(family).model, tiny(family).prompt(((0,),))
    with prune(model, "divprune", keep=0.4):
        expected = new_tokens(answer(model, inputs), inputs)
    pruned, _ = prune_inputs(model, inputs, "divprune", keep=0.4)
    out, tokens = model(**pruned, use_cache=True), []
    for _ in range(4):
        tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@rare(FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels(family, side):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS, labels=True, side=side)
    pruned, info = prune_inputs(model, inputs, "divprune", keep=0.3)
    assert pruned["labels"].shape == pruned["input_ids"].shape
    for ours, before in zip(pruned["labels"], inputs["labels"]):
        assert torch.equal(ours[ours >= 0], before[before >= 0])
    edge = -1 if side == "left" else 0
    assert pruned["attention_mask"][:, edge].all()
    assert torch.isfinite(model(**pruned).loss)
    with prune(model, "divprune", keep=0.3):
        assert model(**inputs).loss == model(**pruned).loss
    assert info.removed == inputs["input_ids"].shape[1] - pruned["input_ids"].shape[1]


def test_gradients_reach_the_projector():
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt(labels=True)
    with torch.enable_grad(), prune(model, "divprune", keep=0.3):
        model(**inputs).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad()


@rare(FAMILIES)
def test_text_alone_passes_through(family):
    model = tiny(family).model
    inputs = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    plain = answer(model, inputs)
    with prune(model, "divprune", keep=0.3) as record:
        assert torch.equal(answer(model, inputs).sequences, plain.sequences)
    assert record.info is None
    same, info = prune_inputs(model, inputs, "divprune")
    assert same == inputs and info.tokens_before == []


@pytest.mark.parametrize("given", ["argument", "configuration", "the model's configuration"])
def test_limits_count_the_whole_prompt(given, monkeypatch):
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    limit = inputs["input_ids"].shape[1] + 6
    options = dict(max_length=limit)
    if given == "configuration":
        options = dict(generation_config=GenerationConfig(**options, pad_token_id=0))
    elif given == "the model's configuration":
        monkeypatch.setattr(model.generation_config, "max_length", limit)
        options = dict(generation_config=GenerationConfig(do_sample=False))
    with prune(model, "divprune", keep=0.25):
        assert model.generate(**inputs, **options).shape[1] == limit


def test_a_streamer_gets_the_answer():
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value)

        def end(self):
            pass

    model, inputs = tiny("llava").model, tiny("llava").prompt()
    streamer = Streamer()
    with prune(model, "divprune", keep=0.25):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat(streamer.seen[1:]), out[0, -3:])


def test_sampling_is_decided_by_the_seed():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    with prune(model, "divprune", keep=0.25):
        torch.manual_seed(1)
        first = model.generate(**inputs, max_new_tokens=5, do_sample=True)
        torch.manual_seed(1)
        assert torch.equal(first, model.generate(**inputs, max_new_tokens=5, do_sample=True))


def test_random_goes_on_from_call_to_call():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    blocks = []
    for _ in range(2):
        with prune(model, "random", keep=0.25) as record:
            blocks.append([model(**inputs) is not None and record.info.kept[0] for _ in range(2)])
    assert all(map(torch.equal, *blocks)) and not torch.equal(*blocks[0])
    own = [prune_inputs(model, inputs, "random", generator=torch.Generator().manual_seed(3))[1].kept for _ in range(2)]
    assert torch.equal(own[0][0], own[1][0])


def test_a_masked_image_token_stays_masked():
    model, inputs = tiny("llava").model, tiny("llava").prompt()
    inputs["attention_mask"][0, 10] = 0
    pruned, info = prune_inputs(model, inputs, "divprune", keep=0.9)
    assert (pruned["attention_mask"] == 0).sum() == 1 and pruned["input_ids"].shape[1] == inputs["input_ids"].shape[
        1
    ] - 4
    mask = dropped_mask(model, inputs, info) * inputs["attention_mask"]
    positions = whole_positions(model, inputs)
    expected = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(model(**pruned).logits[:, -1], expected, **TOLERANCE)


@on_three_axes
def test_kinds_of_tokens_are_found_without_their_ids(family):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    pruned, _ = prune_inputs(model, inputs, "divprune", keep=0.4)
    bare = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    assert torch.equal(prune_inputs(model, bare, "divprune", keep=0.4)[0]["position_ids"], pruned["position_ids"])
    given = {**inputs, "position_ids": whole_positions(model, inputs)}
    assert torch.equal(prune_inputs(model, given, "divprune", keep=0.4)[0]["position_ids"], pruned["position_ids"])


def test_methods_keep_the_same_number():
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt(((0, 1, 2, 3),))
    for keep in (0.5, 0.2, 0.1):
        for method in METHODS:
            _, info = prune_inputs(model, inputs, method, keep=keep)
            assert info.tokens_after == [round(keep * tokens) for tokens in info.tokens_before], method
            assert [len(kept) for kept in info.kept] == info.tokens_after


def test_a_number_of_tokens():
    model, inputs = tiny("llava").model, tiny("llava").prompt(ROWS)
    assert prune_inputs(model, inputs, "divprune", keep=7)[1].tokens_after == [7, 7, 7]


@pytest.mark.parametrize("newline", ["row", "keep", "drop", "compete"])
def test_newlines(newline):
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt(((0,),))
    _, info = prune_inputs(model, inputs, "divprune", keep=0.3, newline=newline)
    layout, kept = info.layouts[0], info.kept[0]
    newlines = kept[layout.partition[kept] < 0]
    rows = layout.newline_of[kept].unique()
    if newline == "keep":
        assert torch.equal(newlines, layout.newlines)
    elif newline == "drop":
        assert not len(newlines)
    elif newline == "row":
        assert torch.equal(newlines, rows[rows >= 0])
    else:
        assert len(newlines) <= 1


@pytest.mark.parametrize("method", ["divprune", "hired", "globalcom2"])
def test_reference_has_compact_positions(method):
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt(((0,),))
    pruned, info = prune_inputs(model, inputs, method, keep=0.3, reference=True)
    assert torch.equal(pruned["position_ids"][0], torch.arange(pruned["input_ids"].shape[1]))
    newlines = (info.layouts[0].partition[info.kept[0]] < 0).sum()
    assert newlines == {"hired": 0, "globalcom2": len(info.layouts[0].newlines)}.get(method, newlines)
    pruned, _ = prune_inputs(model, inputs, method, keep=0.3, reference=True, positions="original")
    assert pruned["position_ids"].max() == inputs["input_ids"].shape[1] - 1


def test_settings_of_a_method():
    model, inputs = tiny("llava_next").model, tiny("llava_next").prompt(((0,),))
    thumbnail = [
        int((info.layouts[0].partition[info.kept[0]] == 0).sum())
        for info in (prune_inputs(model, inputs, "hired", keep=0.2, alpha=alpha)[1] for alpha in (0.0, 0.9))
    ]
    assert thumbnail[0] == 0 and thumbnail[1] > 20


@with_attention
@reads_attention
def test_the_backend_of_attention_does_not_matter(family, method):
    inputs = tiny(family).prompt(ROWS)
    sdpa, eager = (
        prune_inputs(tiny(family, name).model, inputs, method, keep=0.3)[1].kept for name in ("sdpa", "eager")
    )
    assert all(map(torch.equal, sdpa, eager))


@with_attention
@reads_attention
def test_attention_methods_generate(family, method):
    model, inputs = tiny(family).model, tiny(family).prompt(ROWS)
    with prune(model, method, keep=0.3) as record:
        out = answer(model, inputs)
    assert torch.isfinite(out.logits[-1]).all()
    assert record.info.tokens_after == [round(0.3 * tokens) for tokens in record.info.tokens_before]
    assert set(record.info.seconds) == {"encode", "select"}


def test_the_example_in_the_readme_runs():
    import studio

    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [snippet] = [block for block in re.findall(r"^```py\n(.*?)^```", readme, re.M | re.S) if "studio.prune" in block]
    case = tiny_models.LlavaNext()
    names = {"studio": studio, "model": case.model, "inputs": case.prompt()}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["record"].info.tokens_after[0] < names["record"].info.tokens_before[0]
