"""Refined tokens reconstruct an image better than the encoder's, and never worse."""

import numpy as np
import pytest
import torch

import studio
from studio import StudioError
from studio.bench.rate_distortion import held_out_images
from studio.tokenizers.refinement import refined_tokens


@pytest.fixture
def tokenizer(tiny_one_d):
    return tiny_one_d


def random_images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pil_to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0) / 127.5 - 1


@torch.no_grad()
def errors_of(tokenizer, tokens, images, lengths):
    restored = tokenizer.decode(tokens, lengths).clamp(-1, 1)
    return ((restored - images) / 2).square().mean(dim=(1, 2, 3))


def test_no_image_is_worse_and_all_together_are_better(tokenizer):
    images, lengths = random_images(5), [1, 3, 6, 6, 4]
    plain = tokenizer.encode(images)
    before = errors_of(tokenizer, plain, images, lengths)
    tokens, found = refined_tokens(tokenizer, images, lengths, 30)
    after = errors_of(tokenizer, tokens, images, lengths)
    torch.testing.assert_close(after, found)
    assert tokens.shape == plain.shape and (after <= before + 1e-7).all()
    assert after[1:].sum() < before[1:].sum()


def test_more_steps_are_no_worse(tokenizer):
    images = random_images(4)
    found = [refined_tokens(tokenizer, images, [6] * 4, steps)[1] for steps in (0, 5, 25)]
    assert (found[1] <= found[0]).all() and (found[2] <= found[1]).all() and found[2].sum() < found[0].sum()


def test_without_steps_they_are_the_encoders(tokenizer):
    assert torch.equal(refined_tokens(tokenizer, random_images(2), [6, 6], 0)[0], tokenizer.encode(random_images(2)))


def test_tokens_that_do_not_count_are_left_alone_and_weights_get_no_gradients(tokenizer):
    tokens, _ = refined_tokens(tokenizer, random_images(2), [2, 2], 10)
    assert torch.equal(tokens[:, 2:], tokenizer.encode(random_images(2))[:, 2:])
    assert all(weight.grad is None for weight in tokenizer.parameters())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(tokenizer, off):
    with off():
        _, found = refined_tokens(tokenizer, random_images(2), [6, 6], 10)
        assert found.sum() < refined_tokens(tokenizer, random_images(2), [6, 6], 0)[1].sum()


def test_twenty_steps_of_emoji_1d_gain_half_a_decibel():
    """On sixteen images of concepts that it has not seen (seed 0), from all tokens."""
    tokenizer = studio.load("emoji-1d", device="cpu", dtype="float32")
    images = torch.stack([pil_to_tensor(image) for image in held_out_images(tokenizer.config.sample_size, 16, 0)])
    found = [refined_tokens(tokenizer, images, [128] * 16, steps)[1] for steps in (0, 20)]
    gained = -10 * (found[1].log10() - found[0].log10()).mean()
    assert gained > 0.5


@pytest.mark.parametrize("steps", [-1, 1.5, True, None])
def test_what_is_no_number_of_steps_is_refused(tokenizer, steps):
    with pytest.raises(StudioError, match="refine must be a whole number"):
        refined_tokens(tokenizer, random_images(1), [6], steps)
