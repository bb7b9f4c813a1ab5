"""A text encoder that guesses pictures from captions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from studio.training import emoji_words
from studio.training.captioned_tokens import without_effect

CODEBOOK = torch.eye(4)
PICTURES = torch.tensor([range(16), range(16, 0, -1), [0] * 16]) % 4
PLAN = torch.tensor([3, 4, 5, 6])


def text_encoder(**more):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, **more}
    return T5EncoderModel(T5Config(vocab_size=10, dropout_rate=0.0, **sizes))


def captioned(rng, number):
    """Picture i of 4 x 4 codes is called by word i + 7; behind it come the end and the plan, then one padding."""
    chosen = torch.from_numpy(rng.integers(3, size=number))
    one = torch.ones_like(chosen)
    ids = torch.cat((chosen[:, None] + 7, one[:, None], PLAN.expand(number, 4), 0 * one[:, None]), dim=1)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "tokens": PICTURES[chosen]}


def unrelated(rng, number):
    return {**captioned(rng, number), "tokens": PICTURES[torch.from_numpy(rng.integers(3, size=number))]}


def recipe():
    made = emoji_words.EmojiWords()
    made.codebook = CODEBOOK
    return made


def taught_loss(draw, steps=80):
    """The mean loss over the last ten steps."""
    made, guess, losses = recipe(), emoji_words.Guess(text_encoder(), 4, 2, 4), []
    optimizers = made.optimizers(guess, made.defaults.learning_rate)
    for step in range(steps):
        loss = made.loss(guess, draw(np.random.default_rng(step), 16))
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return np.mean(losses[-10:])


def test_words_learn_what_they_look_like():
    assert taught_loss(captioned) < 0.1 < 0.5 < taught_loss(captioned, steps=1)


def test_an_encoder_with_fewer_layers_grows(tmp_path):
    """Further layers change nothing at first."""
    small, grown = text_encoder(), without_effect(text_encoder(num_layers=3))
    small.save_pretrained(tmp_path / "text_encoder")
    emoji_words.read_text_encoder(grown, tmp_path)
    ids = torch.tensor([[7, 1, 3, 4, 5, 6]])
    torch.testing.assert_close(grown(ids).last_hidden_state, small(ids).last_hidden_state)
    assert not torch.equal(text_encoder(num_layers=3)(ids).last_hidden_state, small(ids).last_hidden_state)


def test_a_caption_without_meaning_teaches_nothing():
    assert taught_loss(unrelated) > 0.4


def test_each_plan_token_guesses_its_own_region():
    guess = emoji_words.Guess(text_encoder(), 4, 2, 1).eval()
    guess.head.weight.data.zero_()
    guess.head.bias.data.copy_(torch.arange(4.0))
    batch = captioned(np.random.default_rng(0), 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert guess(ids, mask)[0, :, 0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3] * 2

    class States(torch.nn.Module):
        config = text_encoder().config

        def forward(self, input_ids, attention_mask):
            states = torch.zeros(*input_ids.shape, 32)
            states[..., 0] = input_ids
            return SimpleNamespace(last_hidden_state=states)

    guess = emoji_words.Guess(States(), 4, 2, 1)
    guess.head.weight.data.zero_()
    guess.head.weight.data[:, 0] = 1
    guess.head.bias.data.zero_()
    assert guess(ids, mask)[0, :, 0].tolist() == [3, 3, 4, 4, 3, 3, 4, 4, 5, 5, 6, 6, 5, 5, 6, 6]


def test_padding_does_not_change_the_guess():
    guess = emoji_words.Guess(text_encoder(), 4, 2, 4).eval()
    batch = captioned(np.random.default_rng(0), 2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        assert torch.allclose(guess(ids, mask), guess(ids[:, :-1], mask[:, :-1]), atol=1e-5)


@pytest.mark.parametrize("code_dim", [1, 3])
def test_a_fitted_head_is_the_one_that_made_the_codes(code_dim):
    made, fitted = (emoji_words.Guess(text_encoder(), 4, 2, code_dim).eval() for _ in range(2))
    torch.nn.init.normal_(fitted.head.weight)
    ids = torch.cat((torch.randint(7, 10, (200, 2)), torch.ones(200, 1).long(), PLAN.expand(200, 4)), dim=1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        codes = made(ids, mask)
        assert not torch.allclose(fitted(ids, mask), codes, atol=0.1)
        fitted.fit(ids, mask, codes)
        assert torch.allclose(fitted(ids, mask), codes, atol=0.02)
