"""The network of ResGen: inputs, loss, conditions, ablation."""

import pytest
import torch

from studio import StudioError
from studio.models.resgen import ResGen

SIZES = {
    "num_positions": 6,
    "depth": 3,
    "vocab_size": 7,
    "code_dim": 4,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "components": 5,
    "rank": 2,
}
TEXT = {"caption_dim": 8, "caption_length": 4}


def tiny(**more):
    torch.manual_seed(0)
    model = ResGen(**{**SIZES, **({} if "caption_dim" in more else {"num_classes": 5}), **more})
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.3)
    return model.eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    hidden = torch.tensor([[0, 1, 3, 2, 0, 1], [3, 3, 3, 3, 3, 3]])
    return torch.randn(2, 6, 3, 4), torch.randint(7, (2, 6, 3)), hidden


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
@pytest.mark.parametrize("form", ["variational", "exact"])
def test_the_loss_counts_hidden_levels_only(batch, prediction, form):
    model, (vectors, codes, hidden) = tiny(prediction=prediction), batch
    labels = torch.tensor([1, 2])
    loss = model.loss(vectors, codes, hidden, form, class_labels=labels)
    assert loss.isfinite()
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    codes = torch.where(torch.arange(3) < 3 - hidden[..., None], (codes + 1) % 7, codes)
    torch.testing.assert_close(model.loss(vectors, codes, hidden, form, class_labels=labels), loss)
    with pytest.raises(StudioError, match="variational, exact"):
        model.loss(vectors, codes, hidden, "other", class_labels=labels)


def test_hidden_vectors_are_not_seen(batch):
    model, (vectors, _, hidden) = tiny(), batch
    visible = (vectors * (torch.arange(3) < 3 - hidden[..., None])[..., None]).sum(dim=2)
    prediction = model(visible, hidden, class_labels=torch.tensor([1, 2]))
    assert prediction.logits.shape == (2, 6, 5) and prediction.scores.shape == (2, 6, 5, 2)
    more = model(visible, hidden.clamp(max=2), class_labels=torch.tensor([1, 2]))
    assert not torch.allclose(more.logits[1], prediction.logits[1])


def test_padding_of_captions_is_not_seen():
    model, visible = tiny(**TEXT), torch.randn(2, 6, 4)
    hidden, captions = torch.full((2, 6), 3), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = model(visible, hidden, captions=captions, caption_mask=mask)
    garbage = torch.where(mask[..., None], captions, torch.randn(2, 4, 8))
    torch.testing.assert_close(model(visible, hidden, captions=garbage, caption_mask=mask), expected)
    whole = model(visible[1:], hidden[1:], captions=captions[1:])
    torch.testing.assert_close(whole.logits, expected.logits[1:])


def test_conditions_are_dropped_in_training_only():
    model, visible = tiny(condition_dropout=1.0), torch.randn(2, 6, 4)
    call, labels = (visible, torch.full((2, 6), 3)), torch.tensor([1, 2])
    null = model(*call, class_labels=labels, drop=torch.tensor([True, True])).logits
    assert not torch.allclose(model(*call, class_labels=labels).logits, null)
    torch.testing.assert_close(model.train()(*call, class_labels=labels).logits, null)


@pytest.mark.parametrize("more", [{}, TEXT, {"prediction": "levels"}])
def test_save_and_load(tmp_path, more):
    model = tiny(**more)
    model.save_pretrained(tmp_path)
    loaded = ResGen.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_refuses_what_does_not_fit():
    for wrong in ({"num_classes": None}, {"caption_dim": 8, "num_classes": 5}, {"num_heads": 3}, {"prediction": "x"}):
        with pytest.raises(StudioError):
            ResGen(**{**SIZES, "num_classes": 5, **wrong})
    with pytest.raises(StudioError, match="caption_length"):
        tiny(caption_dim=8)
    with pytest.raises(StudioError, match="class-conditional"):
        tiny()(torch.zeros(1, 6, 4), torch.zeros(1, 6, dtype=torch.long), captions=torch.zeros(1, 4, 8))
    with pytest.raises(StudioError, match="text-conditional"):
        tiny(**TEXT)(torch.zeros(1, 6, 4), torch.zeros(1, 6, dtype=torch.long), class_labels=torch.tensor([0]))
