"""A text encoder that guesses pictures from captions."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from studio.training import words

CODEBOOK = torch.eye(4)
PICTURES = torch.tensor([[0, 1, 2], [3, 3, 0], [1, 0, 2]])


@pytest.fixture(autouse=True)
def few_captions(monkeypatch):
    monkeypatch.setattr(words, "BATCH_SIZE", 16)
    monkeypatch.setattr(words, "WARMUP", 2)


def text_encoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=8, dropout_rate=0.0, **sizes))


def captioned(rng, number):
    """Picture i is called by word i + 2, then comes the end; some captions are padded."""
    chosen = torch.from_numpy(rng.integers(3, size=number))
    ids = torch.stack((chosen + 2, torch.ones_like(chosen), torch.zeros_like(chosen)), dim=1)
    return ids, (ids > 0).long(), PICTURES[chosen]


def test_words_learn_what_they_look_like():
    first, later = (words.teach_words(text_encoder(), CODEBOOK, captioned, steps, seed=0) for steps in (1, 60))
    assert later < 0.1 < 0.5 < first


def test_a_caption_without_meaning_teaches_nothing():
    def unrelated(rng, number):
        ids, mask, _ = captioned(rng, number)
        return ids, mask, PICTURES[torch.from_numpy(rng.integers(3, size=number))]

    assert words.teach_words(text_encoder(), CODEBOOK, unrelated, 60, seed=0) > 0.4


def test_the_seed_decides_the_weights():
    def taught(seed):
        encoder = text_encoder()
        torch.manual_seed(1)
        words.teach_words(encoder, CODEBOOK, captioned, 3, seed)
        return encoder.shared.weight

    assert torch.equal(taught(0), taught(0)) and not torch.equal(taught(0), taught(1))


def test_padding_does_not_change_the_guess():
    guess = words.Guess(text_encoder(), 3, 4).eval()
    ids = torch.tensor([[2, 1]])
    padded = torch.tensor([[2, 1, 0, 0]])
    with torch.no_grad():
        assert torch.allclose(guess(ids, (ids > 0).long()), guess(padded, (padded > 0).long()), atol=1e-5)
