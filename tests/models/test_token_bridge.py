"""TokenBridge at toy size: sizes, causality of the head, its cache, training, saving."""

import pytest
import torch

from studio import StudioError, TokenBridge
from tests.decoding.tiny_token_bridge import SIZES
from tests.decoding.tiny_token_bridge import tiny_token_bridge as tiny


@torch.no_grad()
def test_a_dimension_sees_those_before_it():
    head, states = tiny().head, torch.randn(6, 24)
    tokens = torch.randint(5, (6, 4))
    logits = head(states, tokens)
    assert logits.shape == (6, 4, 5)
    for place in range(4):
        changed = tokens.clone()
        changed[:, place] = (tokens[:, place] + 1) % 5
        moved = (head(states, changed) - logits).abs().amax(dim=(0, 2))
        assert moved[: place + 1].max() == 0
        assert place == 3 or moved[place + 1 :].min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("first_step", [True, False])
def test_logits_with_a_cache_equal_those_of_training(first_step):
    head, states, tokens = tiny().head, torch.randn(6, 24), torch.randint(5, (6, 4))
    condition, cache = head.condition_proj(states), head.new_cache(6)
    before = [None, *tokens.unbind(1)[:-1]]
    cached = torch.stack([head.next_logits(condition, previous, cache, first_step) for previous in before], dim=1)
    torch.testing.assert_close(cached, head(states, tokens, first_step))
    assert not torch.allclose(head(states, tokens, True), head(states, tokens, False), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("asked", [None, 3])
def test_the_loss_is_that_of_the_masked_cells_in_the_order_of_sampling(asked):
    model, values = tiny(), torch.randn(2, 9, 4)
    tokens, order = torch.randint(5, (2, 9, 4)), torch.rand(2, 9).argsort(dim=1)
    labels = torch.tensor([2, 0])
    loss = model(tokens, values, order, 4, asked=asked, class_labels=labels)
    buffer, _ = model.embed_condition(class_labels=labels)
    states = model.decode(model.encode(values, order[:, 4:], buffer), order[:, 4:])
    terms = []
    for image in range(2):
        for cell in order[image, : asked or 4].tolist():
            sampled = tokens[image, cell, [2, 0, 3, 1]]
            log_distribution = model.head(states[image, cell][None], sampled[None])[0].log_softmax(dim=-1)
            terms += [-log_distribution[place, level] for place, level in enumerate(sampled.tolist())]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    hidden = values.scatter(1, order[:, :4, None].expand(-1, -1, 4), torch.nan)
    torch.testing.assert_close(model(tokens, hidden, order, 4, asked=asked, class_labels=labels), loss)


@pytest.mark.parametrize("words", [False, True])
def test_training_reaches_every_weight(words):
    model = tiny(**({"num_classes": None, "caption_dim": 6, "caption_length": 3} if words else {})).train()
    condition = {"class_labels": torch.tensor([0, 1, 2, 0])}
    if words:
        condition = {"captions": torch.randn(4, 3, 6), "caption_mask": torch.tensor([[1, 1, 0]] * 4).bool()}
    tokens, order = torch.randint(5, (4, 9, 4)), torch.rand(4, 9).argsort(dim=1)
    drop = torch.tensor([True, False, False, False])
    model(tokens, torch.randn(4, 9, 4), order, 6, drop=drop, **condition).backward()
    untouched = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not untouched


@torch.no_grad()
def test_an_untrained_block_returns_its_input():
    torch.manual_seed(0)
    head = TokenBridge(**SIZES).eval().head
    x, condition = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    assert torch.equal(head.channel_blocks[0](x, condition, None, 0), x)


def test_saved_and_loaded(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = TokenBridge.from_pretrained(tmp_path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    assert loaded.order.tolist() == [2, 0, 3, 1]


def test_refused_sizes():
    with pytest.raises(StudioError, match="width 16 must split into 3"):
        tiny(head_heads=3)
    with pytest.raises(StudioError, match="each of 0 to 3 once"):
        tiny(dimension_order=(0, 1, 2, 2))
    with pytest.raises(StudioError, match="B, L, H"):
        TokenBridge.preset("XL")
