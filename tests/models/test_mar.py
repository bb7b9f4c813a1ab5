"""MAR at toy size: sizes, patches, training, saving."""

import pytest
import torch

from studio import MAR, StudioError

SIZES = {
    "grid_size": 4,
    "token_dim": 8,
    "patch_size": 2,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "num_classes": 3,
    "buffer_size": 2,
    "head_width": 16,
    "head_depth": 1,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MAR(**SIZES)


def test_patches_keep_latents_and_their_scale(model):
    latents = torch.randn(3, 2, 8, 8)
    tokens = model.patchify(latents)
    assert tokens.shape == (3, 16, 8)
    torch.testing.assert_close(tokens[0, 5, :4], 0.2325 * latents[0, 0, 2:4, 2:4].flatten())
    torch.testing.assert_close(model.unpatchify(tokens), latents)


def test_hidden_tokens_are_not_read(model):
    model.eval()
    tokens, visible = torch.randn(2, 16, 8), torch.tensor([[3, 1], [0, 15]])
    buffer, _ = model.embed_condition(class_labels=torch.tensor([0, 1]))
    others = torch.full_like(tokens, torch.nan).scatter(
        1, visible[..., None].expand(-1, -1, 8), tokens.gather(1, visible[..., None].expand(-1, -1, 8))
    )
    assert torch.equal(model.encode(tokens, visible, buffer), model.encode(others, visible, buffer))


def test_training_reaches_every_weight(model):
    tokens, order = torch.randn(4, 16, 8), torch.rand(4, 16).argsort(dim=1)
    network = model.diffloss.net
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    drop = torch.tensor([True, False, False, False])
    loss = model(tokens, order, 12, class_labels=torch.tensor([0, 1, 2, 0]), drop=drop)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    untouched = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not untouched


def test_a_new_head_predicts_no_noise(model):
    output = model.diffloss.net(torch.randn(5, 8), torch.arange(5), torch.randn(5, 32))
    assert not output.any()


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MAR.from_pretrained(tmp_path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())


def test_refused_sizes():
    with pytest.raises(StudioError, match="heads"):
        MAR(**{**SIZES, "encoder_heads": 3})
    with pytest.raises(StudioError, match="token_dim"):
        MAR(**{**SIZES, "token_dim": 6})
    with pytest.raises(StudioError, match="block"):
        MAR(**{**SIZES, "decoder_depth": 0})
    with pytest.raises(StudioError, match="B, L, H"):
        MAR.preset("XL")
