"""A text encoder that guesses pictures from captions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from studio.training import words

CODEBOOK = torch.eye(4)
PICTURES = torch.tensor([range(16), range(16, 0, -1), [0] * 16]) % 4
PLAN = torch.tensor([3, 4, 5, 6])


@pytest.fixture(autouse=True)
def few_captions(monkeypatch):
    monkeypatch.setattr(words, "BATCH_SIZE", 16)
    monkeypatch.setattr(words, "WARMUP", 2)


def text_encoder():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=10, dropout_rate=0.0, **sizes))


def captioned(rng, number):
    """Picture i of 4 x 4 codes is called by word i + 7; behind it come the end and the plan, then one padding."""
    chosen = torch.from_numpy(rng.integers(3, size=number))
    one = torch.ones_like(chosen)
    ids = torch.cat((chosen[:, None] + 7, one[:, None], PLAN.expand(number, 4), 0 * one[:, None]), dim=1)
    return ids, (ids > 0).long(), PICTURES[chosen]


def teach(encoder, draw, steps, seed=0):
    return words.teach_words(encoder, CODEBOOK, draw, 2, steps, seed)


def test_words_learn_what_they_look_like():
    first, later = (teach(text_encoder(), captioned, steps) for steps in (1, 80))
    assert later < 0.1 < 0.5 < first


def test_a_caption_without_meaning_teaches_nothing():
    def unrelated(rng, number):
        ids, mask, _ = captioned(rng, number)
        return ids, mask, PICTURES[torch.from_numpy(rng.integers(3, size=number))]

    assert teach(text_encoder(), unrelated, 80) > 0.4


def test_the_seed_decides_the_weights():
    def taught(seed):
        encoder = text_encoder()
        torch.manual_seed(1)
        teach(encoder, captioned, 3, seed)
        return encoder.shared.weight

    assert torch.equal(taught(0), taught(0)) and not torch.equal(taught(0), taught(1))


def test_each_plan_token_guesses_its_own_region():
    guess = words.Guess(text_encoder(), 4, 2, 1).eval()
    guess.head.weight.data.zero_()
    guess.head.bias.data.copy_(torch.arange(4.0))
    ids, mask, _ = captioned(np.random.default_rng(0), 1)
    cells = guess(ids, mask)[0, :, 0].tolist()
    assert cells == [0, 1, 0, 1, 2, 3, 2, 3] * 2

    class States(torch.nn.Module):
        config = text_encoder().config

        def forward(self, input_ids, attention_mask):
            states = torch.zeros(*input_ids.shape, 32)
            states[..., 0] = input_ids
            return SimpleNamespace(last_hidden_state=states)

    guess = words.Guess(States(), 4, 2, 1)
    guess.head.weight.data.zero_()
    guess.head.weight.data[:, 0] = 1
    guess.head.bias.data.zero_()
    assert guess(ids, mask)[0, :, 0].tolist() == [3, 3, 4, 4, 3, 3, 4, 4, 5, 5, 6, 6, 5, 5, 6, 6]


def test_padding_does_not_change_the_guess():
    guess = words.Guess(text_encoder(), 4, 2, 4).eval()
    ids, mask, _ = captioned(np.random.default_rng(0), 2)
    with torch.no_grad():
        assert torch.allclose(guess(ids, mask), guess(ids[:, :-1], mask[:, :-1]), atol=1e-5)
