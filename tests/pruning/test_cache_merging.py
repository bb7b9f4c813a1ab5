"""EMS and LOOK-M: what is merged, beside loops over single tokens, and what a model does with it."""

import pytest
import torch
import torch.nn.functional as F

from studio.errors import StudioError
from studio.pruning import kv_cache
from studio.pruning.cache_merging import MERGES, ems, lookm
from studio.pruning.kv_cache import MERGING, compress
from tests.pruning.tiny_families import ROWS, answer, layers, tiny

NEW = 4
methods = pytest.mark.parametrize("method", MERGING)


def sample(tokens=20, seed=0, heads=2, width=6):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, heads, tokens, width, generator=generator)
    return keys, values, torch.rand(heads, tokens, generator=generator)


def attend(query, keys, values, counts=None):
    logits = keys @ query
    return (logits if counts is None else logits + counts.log()).softmax(-1) @ values


@methods
def test_merging_copies_changes_nothing_and_counting_them_matters(method):
    keys, values, scores = sample(6)
    keys, values = keys.repeat(1, 3, 1), values.repeat(1, 3, 1)
    scores = torch.cat((scores + 1, scores / 2, scores / 3), dim=1)
    merged = MERGING[method](keys, values, scores, 6)
    assert (merged.counts == 3).all()
    uneven = MERGING[method](keys[:, :-2], values[:, :-2], scores[:, :-2], 6)
    for head in range(2):
        query = torch.randn(6, generator=torch.Generator().manual_seed(9))
        whole = attend(query, keys[head], values[head])
        torch.testing.assert_close(attend(query, merged.keys[head], merged.values[head], merged.counts[head]), whole)
        whole = attend(query, keys[head, :-2], values[head, :-2])
        parts = uneven.keys[head], uneven.values[head]
        torch.testing.assert_close(attend(query, *parts, uneven.counts[head]), whole)
        assert (attend(query, *parts) - whole).abs().max() > 1e-3


def test_ems_beside_a_loop():
    keys, values, scores = sample(20, seed=3)
    merged = ems(keys, values, scores, 4, threshold=0.02)
    for head in range(2):
        order = sorted(range(20), key=lambda token: -float(scores[head, token]))
        centres, groups = sorted(order[:4]), {centre: [centre] for centre in order[:4]}
        for token in order[4:12]:
            alike = [
                max(float(F.cosine_similarity(keys[head, token], keys[head, c], 0)), 0)
                * max(float(F.cosine_similarity(values[head, token], values[head, c], 0)), 0)
                for c in centres
            ]
            if max(alike) >= 0.02:
                groups[centres[alike.index(max(alike))]].append(token)
        assert merged.kept[head].tolist() == centres
        assert merged.counts[head].tolist() == [len(groups[centre]) for centre in centres]
        assert sum(map(len, groups.values())) > 4
        for at, centre in enumerate(centres):
            members = torch.tensor(groups[centre])
            weight = (scores[head, members] / scores[head, members].sum())[:, None]
            own = keys[head, members]
            direction = F.normalize((F.normalize(own, dim=1) * weight).sum(0), dim=0)
            length = (own.norm(dim=1, keepdim=True) * weight).sum()
            torch.testing.assert_close(merged.keys[head, at], direction * length)
            torch.testing.assert_close(merged.values[head, at], (values[head, members] * weight).sum(0))


def test_ems_without_merges_is_eviction_and_opposites_are_not_redundant():
    keys, values, scores = sample()
    evicted = ems(keys, values, scores, 5, threshold=1.5)
    assert (evicted.counts == 1).all()
    torch.testing.assert_close(evicted.keys, keys.gather(1, evicted.kept[..., None].expand(-1, -1, 6)))
    both = torch.stack((torch.ones(6), -torch.ones(6)))[None]
    assert ems(both, both, torch.tensor([[2.0, 1.0]]), 1, threshold=0.0001).counts.item() == 1


@pytest.mark.parametrize("merge", MERGES)
def test_lookm_beside_a_loop(merge):
    keys, values, scores = sample(15, seed=1)
    merged, unmerged = (lookm(keys, values, scores, 4, merge=merge, merge_keys=on) for on in (True, False))
    for head in range(2):
        order = sorted(range(15), key=lambda token: -float(scores[head, token]))
        centres = sorted(order[:4])
        joined = {centre: [] for centre in centres}
        for token in order[4:]:
            alike = [float(F.cosine_similarity(keys[head, token], keys[head, c], 0)) for c in centres]
            joined[centres[alike.index(max(alike))]].append((token, max(alike)))
        for at, centre in enumerate(centres):
            for rows, found in ((keys, merged.keys), (values, merged.values), (values, unmerged.values)):
                total = rows[head, centre].clone()
                for token, cosine in joined[centre]:
                    half = (rows[head, token] + rows[head, centre]) / 2
                    total += {"average": rows[head, token], "pivot": half, "weighted": cosine * rows[head, token]}[
                        merge
                    ]
                torch.testing.assert_close(found[head, at], total / (1 + len(joined[centre])))
            assert torch.equal(unmerged.keys[head, at], keys[head, centre])
            assert merged.counts[head, at] == 1 + len(joined[centre])


def hidden_and_merged(model, inputs, merges):
    """The whole cache with merged keys and values in place, and what to add to the logits of each of its keys."""
    image = inputs["input_ids"] == model.config.image_token_id
    cache, merges, added = answer(model, inputs, tokens=1).past_key_values, iter(merges), []
    for layer in cache.layers:
        bias = torch.zeros(layer.keys.shape[:3]).masked_fill(image[:, None], torch.finfo(torch.float32).min)
        for row, places in enumerate(image):
            merged, places = next(merges), places.nonzero().flatten()
            for head, kept in enumerate(merged.kept):
                layer.keys[row, head, places[kept]] = merged.keys[head]
                layer.values[row, head, places[kept]] = merged.values[head]
                bias[row, head, places[kept]] = merged.counts[head].log()
        groups = model.config.get_text_config().num_attention_heads // bias.shape[1]
        added.append(bias.repeat_interleave(groups, dim=1)[:, :, None])
    return cache, added


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@methods
def test_a_model_reads_merged_keys(monkeypatch, method, attention, family):
    merges, merge = [], MERGING[method]

    def noting(*arguments, **options):
        merges.append(merge(*arguments, **options))
        return merges[-1]

    monkeypatch.setitem(MERGING, method, noting)
    monkeypatch.setattr(kv_cache, "_OWN", {"arguments"})
    made = tiny(family, attention)
    inputs = made.prompt(ROWS)
    with compress(made.model, method, keep=0.2):
        short = answer(made.model, inputs, tokens=NEW)
    assert any((merged.counts > 1).any() for merged in merges)
    cache, added = hidden_and_merged(made.model, inputs, merges)

    def hook(number):
        def biased(layer, arguments, keywords):
            given, bias = keywords["attention_mask"], added[number]
            if given.dtype == torch.bool:
                given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
            bias = F.pad(bias, (0, given.shape[-1] - bias.shape[-1])) + given
            return arguments, {**keywords, "attention_mask": bias.clamp(min=torch.finfo(torch.float32).min)}

        return biased

    step = short.sequences[:, inputs["input_ids"].shape[1] :]
    mask = inputs["attention_mask"]
    start = mask.sum(1, keepdim=True) + (made.model.model.rope_deltas if family == "qwen3_vl" else 0)
    hooks = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in enumerate(layers(made.model))]
    try:
        for at in range(NEW - 1):
            mask, positions = F.pad(mask, (0, 1), value=1), start + at
            positions = positions.expand(3, -1, -1) if family == "qwen3_vl" else positions
            given = {"input_ids": step[:, at : at + 1], "attention_mask": mask, "position_ids": positions}
            logits = made.model(**given, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, short.logits[at + 1], atol=1e-5, rtol=1e-5)
    finally:
        for handle in hooks:
            handle.remove()


@pytest.mark.parametrize("beams", [1, 3])
@methods
def test_a_batch_equals_its_rows(method, beams):
    rows, options = ((0,), (1, 2), (2,)), dict(num_beams=beams, num_return_sequences=beams)
    made = tiny("llava_next")
    whole = made.prompt(rows)
    with compress(made.model, method, keep=0.2):
        batch = answer(made.model, whole, **options).sequences[:, whole["input_ids"].shape[1] :]
        for row, together in enumerate(batch.view(len(rows), beams, -1)):
            real, alone = whole["attention_mask"][row].bool(), made.prompt((rows[row],))
            alone |= {name: whole[name][row, real][None] for name in ("input_ids", "attention_mask")}
            assert torch.equal(answer(made.model, alone, **options).sequences[:, int(real.sum()) :], together)


def test_refusals():
    model = tiny("llava").model
    with pytest.raises(StudioError, match="lookm takes merge, merge_keys, not tau"), compress(model, "lookm", tau=1):
        pass
    with pytest.raises(StudioError, match="snapkv has no settings"), compress(model, "snapkv", merge="pivot"):
        pass
    with pytest.raises(StudioError, match="average"):
        lookm(*sample(), 3, merge="sum")
    with pytest.raises(StudioError, match="threshold"):
        ems(*sample(), 3, threshold=-1)
