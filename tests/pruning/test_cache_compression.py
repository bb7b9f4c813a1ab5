"""A cache that forgets: what is said later is what a whole cache says whose forgotten keys are masked, head by head."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from studio.errors import StudioError
from studio.pruning.kv_cache import MERGING, compress, equal_shares
from studio.pruning.registry import IN_CACHE
from studio.pruning.scope import coverage_order
from tests.pruning.tiny_families import FAMILIES, ROWS, answer, layers, tiny

WINDOWED = ("aya_vision", "cohere2_vision", "gemma3", "gemma4")
NEW = 5
methods = pytest.mark.parametrize("method", IN_CACHE)
evicting = pytest.mark.parametrize("method", [method for method in IN_CACHE if method not in MERGING])


def held_columns(model, inputs, cache):
    """For each layer (B, heads, L) bool: which of the prompt's keys are in the cache, found by their values."""
    whole = answer(model, inputs, tokens=1).past_key_values
    found = []
    for layer, full in zip(cache.layers, whole.layers):
        kept = layer.keys[:, :, : layer.real.shape[1]]
        same = (full.keys[:, :, :, None] - kept[:, :, None]).abs().amax(-1) < 1e-6
        found.append((same & layer.real[:, None, None]).any(-1))
    return found


def answered_with_masked_keys(model, inputs, held):
    def hook(number):
        def masked(layer, arguments, keywords):
            mask = keywords["attention_mask"]
            if mask.shape[2] > 1:
                return None
            groups = model.config.get_text_config().num_attention_heads // held[number].shape[1]
            gone = ~F.pad(held[number], (0, mask.shape[-1] - held[number].shape[-1]), value=True)
            gone = gone.repeat_interleave(groups, dim=1)[:, :, None]
            mask = mask.expand(-1, gone.shape[1], -1, -1).masked_fill(gone, torch.finfo(mask.dtype).min)
            return arguments, {**keywords, "attention_mask": mask}

        return masked

    hooks = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in enumerate(layers(model))]
    try:
        return answer(model, inputs, tokens=NEW)
    finally:
        for handle in hooks:
            handle.remove()


def check_against_masked_keys(family, method):
    model, inputs = tiny(family, "eager").model, tiny(family).prompt(ROWS)
    with compress(model, method, keep=0.2) as record:
        short = answer(model, inputs, tokens=NEW)
    held = held_columns(model, inputs, short.past_key_values)
    masked = answered_with_masked_keys(model, inputs, held)
    assert torch.equal(short.sequences, masked.sequences)
    for ours, theirs in zip(short.logits, masked.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    image = inputs["input_ids"] == model.config.image_token_id
    wanted = torch.tensor(record.info.tokens_after)
    assert record.info.tokens_after == [max(1, round(0.2 * tokens)) for tokens in record.info.tokens_before]
    counts = torch.stack([(columns & image[:, None]).sum(-1) for columns in held])
    if method == "prefixkv":
        assert torch.equal(counts[:, :, 0].sum(0), wanted * len(counts))
    else:
        assert (counts == wanted[None, :, None]).all()
    text = inputs["attention_mask"].bool() & ~image
    assert all((columns | ~text[:, None]).all() for columns in held)
    for layer in short.past_key_values.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.keys.shape[2] < layer.get_seq_length() == image.shape[1] + NEW - 1


@evicting
def test_what_is_forgotten_is_masked(method):
    check_against_masked_keys("llava", method)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "mistral3"])
def test_families(family):
    check_against_masked_keys(family, "snapkv")


@methods
def test_keeping_all_changes_nothing(method):
    model, inputs = tiny("llava").model, tiny("llava").prompt(((0,),))
    plain = answer(model, inputs)
    with compress(model, method, keep=1.0):
        same = answer(model, inputs)
    assert torch.equal(plain.sequences, same.sequences)
    for ours, theirs in zip(same.logits, plain.logits):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_equals_its_rows(beams):
    rows, options = ((0,), (1, 2), (2,)), dict(num_beams=beams, num_return_sequences=beams)
    made = tiny("llava_next")
    whole = made.prompt(rows)
    with compress(made.model, "snapkv", keep=0.2):
        batch = answer(made.model, whole, **options).sequences[:, whole["input_ids"].shape[1] :]
        for row, together in enumerate(batch.view(len(rows), beams, -1)):
            real, alone = whole["attention_mask"][row].bool(), made.prompt((rows[row],))
            alone |= {name: whole[name][row, real][None] for name in ("input_ids", "attention_mask")}
            assert torch.equal(answer(made.model, alone, **options).sequences[:, int(real.sum()) :], together)


@methods
def test_a_prompt_without_images_among_others(method):
    """Each row says what it says alone."""
    rows, made = ((0,), (), (1, 2)), tiny("llava_next")
    whole = made.prompt(rows)
    with compress(made.model, method, keep=0.1) as record:
        batch = answer(made.model, whole)
        assert record.info.tokens_before[1] == record.info.tokens_after[1] == 0
        for row in range(len(rows)):
            real = whole["attention_mask"][row].bool()
            alone = made.prompt((rows[row],)) if rows[row] else {}
            alone |= {name: whole[name][row, real][None] for name in ("input_ids", "attention_mask")}
            for ours, theirs in zip(answer(made.model, alone).logits, batch.logits):
                torch.testing.assert_close(ours[0], theirs[row], atol=2e-5, rtol=1e-4)


@methods
@pytest.mark.parametrize("keep", [0.2, 1.0, 30])
def test_hidden_image_tokens_do_not_count(method, keep):
    model, inputs = tiny("llava").model, tiny("llava").prompt(ROWS)
    image = inputs["input_ids"] == model.config.image_token_id
    hidden = image.nonzero()[:20]
    inputs["attention_mask"][hidden[:, 0], hidden[:, 1]] = 0
    seen = (image & inputs["attention_mask"].bool()).sum(1).tolist()
    plain = answer(model, inputs, tokens=1)
    with compress(model, method, keep=keep) as record:
        out = answer(model, inputs, tokens=1)
    wanted = [min(keep, tokens) if isinstance(keep, int) else round(keep * tokens) for tokens in seen]
    assert seen == [16, 72] and record.info.tokens_before == [36, 72] and record.info.tokens_after == wanted
    assert torch.equal(out.logits[0], plain.logits[0])
    text = inputs["attention_mask"].sum(1) - torch.tensor(seen)
    held = torch.stack([layer.real.sum(1) for layer in out.past_key_values.layers])
    assert torch.equal(held.sum(0), (text + torch.tensor(wanted)) * len(held))


def kept_images(method, keep):
    """For each layer and head, the places among the image tokens that are kept, and the eager model's attention."""
    made = tiny("llava", "eager")
    inputs = made.prompt()
    image = (inputs["input_ids"][0] == made.model.config.image_token_id).nonzero().flatten()
    attention = made.model(**inputs, output_attentions=True).attentions
    with compress(made.model, method, keep=keep):
        cache = answer(made.model, inputs, tokens=1).past_key_values
    held = held_columns(made.model, inputs, cache)
    return [[columns[0, head, image] for head in range(columns.shape[1])] for columns in held], attention, image


def test_heavy_hitters_and_the_latest():
    kept, attention, image = kept_images("h2o", 10)
    for layer, heads in zip(attention, kept):
        for head, places in enumerate(heads):
            heavy = layer[0, head].sum(0)[image[:-5]].topk(5).indices
            assert places.nonzero().flatten().tolist() == sorted([*heavy.tolist(), *range(31, 36)])


def test_what_the_last_window_attends_to():
    kept, attention, image = kept_images("snapkv", 10)
    for layer, heads in zip(attention, kept):
        for head, places in enumerate(heads):
            smooth = F.avg_pool1d(layer[0, head, -32:].sum(0)[None], 5, stride=1, padding=2)[0]
            assert torch.equal(places.nonzero().flatten(), smooth[image].topk(10).indices.sort().values)


def test_equal_shares_leave_the_poorest_layer_the_most():
    masses = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    shares = (masses / masses.sum(1, keepdim=True)).cumsum(1)
    found = equal_shares(masses, 8)
    every = [(a, b, 8 - a - b) for a in range(1, 6) for b in range(1, 6) if 1 <= 8 - a - b <= 5]
    worst = [min(float(shares[layer, n - 1]) for layer, n in enumerate(numbers)) for numbers in every]
    assert sum(found) == 8 and min(float(shares[layer, n - 1]) for layer, n in enumerate(found)) == max(worst)
    assert equal_shares(torch.ones(4, 6), 12) == [3] * 4


def test_coverage_is_near_the_best_set_and_picks_no_copy():
    for seed in range(20):
        rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
        likeness = F.normalize(rows) @ F.normalize(rows).T

        def covered(chosen, likeness=likeness):
            return float(likeness[:, list(chosen)].clamp(min=0).amax(1).sum())

        best = max(map(covered, combinations(range(9), 3)))
        assert covered(coverage_order(rows, 3).tolist()) >= (1 - 1 / 2.718281828) * best
    twice = torch.eye(4).repeat(2, 1)
    assert sorted(coverage_order(twice, 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("method, layer", [("coverage", 0), ("coverage-merge", 1)])
def test_what_a_layer_reads_is_covered(method, layer):
    """The model has two layers: the third is taken to be the last."""
    made = tiny("llava")
    inputs = made.prompt()
    image = inputs["input_ids"][0] == made.model.config.image_token_id
    states = made.model(**inputs, output_hidden_states=True).hidden_states
    with compress(made.model, method, keep=10) as record:
        answer(made.model, inputs, tokens=1)
    [kept] = record.info.kept
    orders = [sorted(coverage_order(state[0, image], 10).tolist()) for state in states]
    assert orders[layer] == kept.tolist() and orders[0] != orders[1]


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_refused(family):
    assert family in FAMILIES
    with pytest.raises(StudioError, match="window"), compress(tiny(family).model, "coverage"):
        pass


def test_refusals():
    made = tiny("llava")
    with pytest.raises(StudioError, match="coverage, coverage-merge, snapkv"), compress(made.model, "divprune"):
        pass
    with pytest.raises(StudioError, match="fraction"), compress(made.model, "snapkv", keep=3.5):
        pass
    with compress(made.model, "snapkv"), pytest.raises(StudioError, match="cache_implementation"):
        made.model.generate(**made.prompt(), max_new_tokens=2, cache_implementation="static")
    assert "forward" not in made.model.__dict__
