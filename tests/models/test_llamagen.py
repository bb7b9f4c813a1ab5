"""The network: sizes, conditions, training forward, cache."""

import pytest
import torch

from studio import LlamaGen, StudioError
from studio.models.kv_cache import KVCache
from studio.models.llamagen import rope_table

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


def test_null_caption_is_not_trained():
    model = tiny(caption_dim=16, caption_length=5)
    assert "cls_embedding.uncond_embedding" in model.state_dict()
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())


@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_several_tokens_at_once_equal_one_by_one(num_kv_heads):
    model, tokens = tiny(num_kv_heads=num_kv_heads), torch.randint(48, (2, 9))
    labels = torch.tensor([3, 4])
    with torch.no_grad():
        expected = model(tokens, class_labels=labels)
        views = [model] if num_kv_heads else [model, model.for_decoding("float32")]
        for network in views:
            cache = network.new_cache(2)
            prefix, valid = model.embed_condition(class_labels=labels)
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


def test_packed_view_without_blocked_products(monkeypatch):
    from studio.models import packed

    monkeypatch.setattr(packed, "_has_blocked_products", lambda: False)
    model, tokens, labels = tiny(), torch.randint(48, (2, 9)), torch.tensor([3, 4])
    network = packed.PackedLlamaGen(model)
    cache = network.new_cache(2)
    with torch.no_grad():
        network.prefill(*model.embed_condition(class_labels=labels), cache)
        logits = network.extend(tokens, cache)
        expected = model(tokens, class_labels=labels)[:, 1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_plan_stands_where_its_regions_are():
    """Rotations add up: the turn between a cell and its region's plan vector depends on their distance alone."""
    plain, planned = (rope_table(4, 16, 7, 10000.0, "identity", size) for size in (0, 2))
    assert torch.equal(plain[:3], planned[:3]) and torch.equal(plain[7:], planned[7:])
    turns = torch.view_as_complex(planned)
    plan, cells = turns[3:7].view(2, 2, -1), turns[7:].view(4, 4, -1)
    for row in range(2):
        for column in range(2):
            middle = (cells[2 * row, 2 * column] * cells[2 * row + 1, 2 * column + 1]) / cells[0, 1]
            assert torch.allclose(plan[row, column] ** 2, middle / cells[0, 1], atol=1e-6)


def test_a_plan_that_does_not_fit_is_refused():
    for wrong in ({"caption_length": 3, "plan_size": 2}, {"caption_length": 99, "plan_size": 9}):
        with pytest.raises(StudioError, match="plan"):
            tiny(caption_dim=16, **wrong)
    with pytest.raises(StudioError, match="plan"):
        tiny(num_classes=3, plan_size=1)
