"""Races in C have the winners of PyTorch's, or leave them to it."""

import pytest
import torch

from studio import backends
from studio.backends.cpu_c_sampling import race_winners
from studio.backends.native_library import library
from studio.decoding.sampling import Sampling, sample_rows

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def numbers(rows=600, vocab=72, spread=4.0):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    return logits, torch.empty(rows, vocab).exponential_(generator=generator)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 2, 9, 72, 100])
def test_winners_are_those_of_torch(temperature, top_k):
    (logits, noise), sampling = numbers(), Sampling(temperature, top_k)
    logits[:, ::3] = logits[:, ::3].round()  # ties with the last that stays
    places = torch.arange(len(logits)).flip(0)
    expected = sample_rows(sampling.probabilities(logits), noise=noise[places])
    ours = race_winners(logits, noise, places, sampling.divisor, sampling.top_k)
    assert torch.equal(ours, expected)
    assert torch.equal(sampling.winners(logits, noise, places), expected)


def test_a_filter_is_seen():
    """Negative control: without top-k other tokens win."""
    logits, noise = numbers(spread=1.0)
    places = torch.arange(len(logits))
    assert not torch.equal(race_winners(logits, noise, places, 1.0, 9), race_winners(logits, noise, places, 1.0, 0))


def test_tokens_that_cannot_be_told_apart_are_left_to_torch():
    logits, noise = numbers(rows=4)
    logits[2, 5:7], noise[2, 5:7] = 30.0, 0.01
    noise[2, 6] *= 1 + 1e-6
    found = race_winners(logits, noise, torch.arange(4), 1.0, 0)
    assert found[2] == -1 and (found[[0, 1, 3]] >= 0).all()
    expected = sample_rows(Sampling().probabilities(logits), noise=noise)
    assert torch.equal(Sampling().winners(logits, noise), expected)


def test_impossible_tokens_never_win():
    logits, noise = numbers()
    logits[:, 1:] = float("-inf")
    assert not race_winners(logits, noise, torch.arange(len(logits)), 1.0, 5).any()
    logits[0, 0] = float("nan")
    assert race_winners(logits, noise, torch.arange(len(logits)), 1.0, 5)[0] == -1


def test_what_does_not_fit_is_left_to_torch():
    logits, noise = numbers()
    assert backends.select_race(logits, noise) is race_winners
    assert backends.select_race(logits[:, :70], noise[:, :70]) is None
    assert backends.select_race(logits.bfloat16(), noise) is None
    with backends.using("plain"):
        assert backends.select_race(logits, noise) is None


def test_threads_change_nothing():
    logits, noise = numbers(rows=64, vocab=4096)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(race_winners(logits, noise, torch.arange(64), 0.7, 50))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
