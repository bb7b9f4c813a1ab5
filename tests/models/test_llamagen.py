"""The network: sizes, conditions, training forward, cache."""

import pytest
import torch

from studio import LlamaGen, StudioError, backends
from studio.models.kv_cache import KVCache
from studio.models.llama_blocks import rotate

SIZES = {"vocab_size": 48, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4}


def tiny(**more):
    torch.manual_seed(0)
    model = LlamaGen(**{**SIZES, **({} if "caption_dim" in more else {"num_classes": 10}), **more})
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


def test_logits_start_at_zero():
    model = LlamaGen(**SIZES, num_classes=10)
    logits = model(torch.zeros(2, 15, dtype=torch.long), class_labels=torch.tensor([0, 1]))
    assert logits.shape == (2, 16, 48) and logits.dtype == torch.float32
    assert not logits.any()


def test_padding_side_and_content_do_not_matter():
    model = tiny(caption_dim=16, caption_length=5, prefix_rope="identity")
    tokens, captions = torch.randint(48, (1, 15)), torch.randn(1, 5, 16)
    right = torch.tensor([[True, True, False, False, False]])
    expected = model(tokens, captions=captions, caption_mask=right)
    garbage = torch.cat((captions[:, :2], torch.randn(1, 3, 16)), dim=1)
    torch.testing.assert_close(model(tokens, captions=garbage, caption_mask=right), expected)
    left = torch.cat((torch.randn(1, 3, 16), captions[:, :2]), dim=1)
    torch.testing.assert_close(model(tokens, captions=left, caption_mask=right.flip(1)), expected)


def test_conditions_are_dropped_in_training_only():
    model = tiny(class_dropout=1.0, dropout=0.0)
    tokens, labels = torch.randint(48, (2, 15)), torch.tensor([1, 2])
    null = model(tokens, class_labels=labels, drop=torch.tensor([True, True]))
    assert not torch.allclose(model(tokens, class_labels=labels), null)
    torch.testing.assert_close(model.train()(tokens, class_labels=labels), null)


@torch.no_grad()
def test_region_conditioning_goes_to_the_positions_that_predict_its_cells():
    """4 x 4 cells in 2 x 2 regions; with zero weights there is none; padding on either side."""
    model = tiny(caption_dim=16, caption_length=5, plan_size=2)
    tokens, captions = torch.randint(48, (2, 15)), torch.randn(2, 5, 16)
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, True, True]])
    without = model(tokens, captions=captions, caption_mask=mask)
    assert not model.region_conditioning(model.embed_condition(captions=captions)[0]).any()
    torch.nn.init.normal_(model.plan_embeddings.weight)
    padded_right = torch.cat((captions[:1, 1:], captions[:1, :1]), dim=1)
    logits = model(tokens, captions=captions, caption_mask=mask)
    torch.testing.assert_close(
        model(tokens[:1], captions=padded_right, caption_mask=mask[:1].roll(-1, dims=1)), logits[:1]
    )
    assert ((logits - without).abs().amax(dim=2) > 1e-3).all()
    prefix, _ = model.embed_condition(captions=captions)
    plan = model.region_conditioning(prefix)
    for region in range(4):
        other = prefix.clone()
        other[:, 1 + region] += 1
        changed = (model.region_conditioning(other) != plan).any(dim=2)
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[region // 2 * 2 :, region % 2 * 2 :][:2, :2] = True
        assert not changed[:, :4].any() and not changed[:, -1].any()
        assert torch.equal(changed[:, 4:-1], expected.flatten().expand(2, 16))


@torch.no_grad()
def test_a_row_has_one_dimensional_rotary_positions():
    """Scores of equal content depend on the distance only; the prefix is not rotated."""
    model = tiny(grid_size=None, row_length=9, prefix_rope="identity")
    table = model.rope()
    assert model.num_tokens == 9 and table.shape == (10, 8, 2)
    assert torch.equal(table[0], table[1]) and torch.equal(table[0, :, 0], torch.ones(8))
    angles = torch.outer(torch.arange(9), 10000 ** -(torch.arange(8) / 8))
    torch.testing.assert_close(table[1:], torch.stack((angles.cos(), angles.sin()), dim=-1))
    query, key = (rotate(torch.randn(16).expand(1, 9, 1, 16), table[1:])[0, :, 0] for _ in range(2))
    met = query @ key.T
    for distance in range(9):
        same = met.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert (met.diagonal(-1)[0] - met[0, 0]).abs() > 1e-3


def test_null_caption_is_not_trained():
    model = tiny(caption_dim=16, caption_length=5)
    assert "cls_embedding.uncond_embedding" in model.state_dict()
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())


@pytest.mark.parametrize("num_kv_heads", [None, 1])
@pytest.mark.parametrize("kind", ["classes", "regions", "row", "row with regions"])
def test_several_tokens_at_once_equal_one_by_one(num_kv_heads, kind):
    condition, sizes = {"class_labels": torch.tensor([3, 4])}, {}
    if regions := "regions" in kind:
        condition, sizes = {"captions": torch.randn(2, 5, 16)}, {"caption_dim": 16, "caption_length": 5, "plan_size": 2}
    if "row" in kind:
        sizes |= {"grid_size": None, "row_length": 10}
    model, tokens = tiny(num_kv_heads=num_kv_heads, **sizes), torch.randint(48, (2, 9))
    if regions:
        for weights in model.plan_embeddings.parameters():
            torch.nn.init.normal_(weights)
    with torch.no_grad():
        expected = model(tokens, **condition)
        networks = [model] if num_kv_heads else [model, backends.select(model, "float32")]
        for network in networks:
            cache = network.new_cache(2)
            prefix, valid = model.embed_condition(**condition)
            parts = [network.prefill(prefix, valid, cache)[:, None]]
            parts += [network.extend(part, cache) for part in tokens.split([1, 5, 3], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_cache_crops_and_refuses():
    cache = KVCache(num_layers=1, rows=2, num_kv_heads=1, max_length=3, head_dim=4)
    cache.update(0, torch.ones(2, 2, 1, 2, 4))
    cache.advance(2)
    with pytest.raises(StudioError, match="3 positions"):
        cache.update(0, torch.ones(2, 2, 1, 2, 4))
    cache.crop(1)
    keys, values = cache.update(0, torch.zeros(2, 2, 1, 1, 4))
    assert keys.shape == values.shape == (2, 1, 2, 4)
    assert keys[:, :, 0].all() and not keys[:, :, 1].any()
    for wrong in (lambda: cache.crop(9), lambda: cache.keep_rows(3), lambda: cache.keep_rows(0)):
        with pytest.raises(StudioError):
            wrong()


def test_presets():
    with torch.device("meta"):
        assert LlamaGen.preset("B").config.num_classes == 1000
        assert LlamaGen.preset("XL", caption_dim=2048, caption_length=120).prefix_length == 120
    with pytest.raises(StudioError, match="sizes are"):
        LlamaGen.preset("Z")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"num_classes": 3, "caption_dim": 4, "caption_length": 2},
        {"caption_dim": 4},
        {"num_classes": 3, "num_heads": 3},
        {"num_classes": 3, "num_kv_heads": 3},
        {"num_classes": 3, "prefix_rope": "none"},
        {"num_classes": 3, "plan_size": 1},
        {"caption_dim": 4, "caption_length": 3, "plan_size": 2},
        {"caption_dim": 4, "caption_length": 9, "plan_size": 3},
        {"num_classes": 3, "grid_size": None},
        {"num_classes": 3, "row_length": 6},
        {"num_classes": 3, "grid_size": None, "row_length": 0},
        {"caption_dim": 4, "caption_length": 3, "grid_size": None, "row_length": 16, "plan_size": 2},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(wrong):
    with pytest.raises(StudioError):
        LlamaGen(**{**SIZES, **wrong})


def test_conditions_that_do_not_fit():
    tokens = torch.zeros(1, 15, dtype=torch.long)
    with pytest.raises(StudioError, match="class-conditional"):
        tiny()(tokens, captions=torch.zeros(1, 5, 16))
    text = tiny(caption_dim=16, caption_length=5)
    with pytest.raises(StudioError, match="text-conditional"):
        text(tokens, class_labels=torch.zeros(1, dtype=torch.long))
    with pytest.raises(StudioError, match="shape"):
        text(tokens, captions=torch.zeros(1, 4, 16))
    with pytest.raises(StudioError, match="16 tokens"):
        tiny()(torch.zeros(1, 17, dtype=torch.long), class_labels=torch.zeros(1, dtype=torch.long))


def test_packed_backend_without_blocked_products(monkeypatch):
    from studio.backends import packed

    monkeypatch.setattr(packed, "_has_blocked_products", lambda: False)
    model, tokens, labels = tiny(), torch.randint(48, (2, 9)), torch.tensor([3, 4])
    network = packed.PackedLlamaGen(model)
    cache = network.new_cache(2)
    with torch.no_grad():
        network.prefill(*model.embed_condition(class_labels=labels), cache)
        logits = network.extend(tokens, cache)
        expected = model(tokens, class_labels=labels)[:, 1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
