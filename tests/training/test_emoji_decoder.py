"""The decoder that is sharpened: what learns from what, and what stays as it is."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from studio.training import emoji_decoder
from studio.training.emoji_decoder import Critic, EmojiDecoder, SharpenedVQ


@pytest.fixture
def module(tiny_vq):
    torch.manual_seed(0)
    return SharpenedVQ(copy.deepcopy(tiny_vq), Critic((8, 8, 8, 8), 2))


def pictures(number=4):
    images = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, torch.arange(number) % 2


def test_the_critic_learns_from_its_own_loss_alone(module):
    images, styles = pictures()
    module(images, styles).backward()
    grads = [weight.grad.clone() for weight in module.critic.parameters()]
    module.zero_grad()
    true, false = (module.critic(shown, styles)[0] for shown in (images, module.tokenizer(images).detach()))
    (F.relu(1 - true).mean() + F.relu(1 + false).mean()).backward()
    for weight, grad in zip(module.critic.parameters(), grads, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_only_the_decoder_is_moved_and_heeds_the_critic(module, monkeypatch):
    images, styles = pictures()
    module(images, styles).backward()
    with_grad = {name.split(".")[0] for name, weight in module.tokenizer.named_parameters() if weight.grad is not None}
    assert with_grad == {"decoder", "post_quant_conv"}
    heeding = module.tokenizer.post_quant_conv.weight.grad.clone()
    module.zero_grad()
    monkeypatch.setattr(emoji_decoder, "CRITIC_WEIGHT", 0.0)
    module(images, styles).backward()
    assert not torch.allclose(module.tokenizer.post_quant_conv.weight.grad, heeding)


def test_a_critic_tells_styles_apart():
    """Bright pictures are true in one style, dark ones in the other: after 60 steps each is scored by its own."""
    torch.manual_seed(0)
    critic = Critic((8, 8, 8, 8), 2)
    images, styles = torch.full((2, 3, 16, 16), 0.8) * torch.tensor([1.0, -1.0])[:, None, None, None], torch.arange(2)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.relu(1 - critic(images, styles)[0]).mean() + F.relu(1 + critic(images, styles.flip(0))[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    true, false = critic(images, styles)[0], critic(images, styles.flip(0))[0]
    assert (true > 0.5).all() and (false < -0.5).all()


def test_styles_and_pictures_belong_together():
    """Pictures of one colour for each style, on any background: a batch shows the right one at its style."""
    recipe = EmojiDecoder()
    recipe.pictures = np.zeros((3, 2, 16, 16, 4), dtype=np.uint8)
    recipe.pictures[..., 3] = 255
    recipe.pictures[:, 1, ..., :3] = 255
    batch = recipe.batch(np.random.default_rng(0), 7, torch.device("cpu"))
    assert batch["styles"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    middles = batch["images"][:, :, 8, 8].mean(dim=1)
    assert (middles[batch["styles"] == 1] > 0.9).all() and (middles[batch["styles"] == 0] < -0.9).all()
    assert recipe.batch(np.random.default_rng(0), 1, torch.device("cpu"))["images"].shape == (1, 3, 16, 16)
