"""Races in C have the winners of PyTorch's, or leave them to it; guesses are tested as by `decide`."""

import pytest
import torch

from studio import backends
from studio.backends.cpu_c_sampling import guess_outcomes, race_winners
from studio.backends.native_library import library
from studio.decoding.autoregressive import guided_logits
from studio.decoding.couplings import Chance, decide, next_proposals
from studio.decoding.lantern import Relaxation, neighbour_table
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


BUDGETS = [None, (0.4, None), (0.1, 3.0), (None, 5.0), (0.0, None)]


def windows(images, vocab, budgets, top_k, places=5, seed=5):
    """Logits, guesses with what they were sampled from, random numbers and a rule, for `decide` and for C."""
    generator = torch.Generator().manual_seed(seed)
    proposals = (torch.randn(images, places - 1, vocab, generator=generator) * 3).softmax(dim=-1)
    proposals[::4, -1] = torch.eye(vocab)[3]  # a guess without a distribution
    guesses = torch.multinomial(proposals.flatten(0, 1), 1, generator=generator).view(images, places - 1)
    near = proposals.log().clamp(min=-20) + torch.randn(proposals.shape, generator=generator)
    logits = torch.cat((near, torch.randn(images, 1, vocab, generator=generator) * 3), dim=1)
    logits[::5, 1] = proposals[::5, 1].log()  # passes, and nothing is left of p - q
    logits[::6, 0] = torch.full((vocab,), float("-inf")).scatter(0, guesses[0, :1], 0.0)  # known
    numbers = torch.rand(images, 2 * places, generator=generator, dtype=torch.float64)
    rule = None
    if budgets is not None:
        rule = Relaxation(neighbour_table(torch.randn(vocab, 6, generator=generator), 20), 10, *budgets)
    return logits, guesses, proposals, Chance(numbers), Sampling(0.7, top_k), rule


def both_ways(coupling, logits, guesses, proposals, chance, sampling, rule, scales=None):
    given = logits
    if scales is not None:
        given = torch.cat((logits, logits.roll(1, dims=0)))
        logits = guided_logits(given, scales[:, :, None])
    distributions = sampling.probabilities(logits.flatten(0, 1)).view_as(logits)
    outcomes, right = decide(distributions, guesses, proposals, chance, coupling, rule)
    following, ours = next_proposals(distributions, outcomes, right), proposals.clone()
    filters = (sampling.divisor, sampling.top_k)
    found = guess_outcomes(given, scales, guesses, ours, chance.numbers, *filters, coupling == "maximal", rule)
    return (outcomes, right, following), (found[:, :-1], found[:, -1], ours)


@pytest.mark.parametrize("coupling", ["none", "maximal"])
@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
@pytest.mark.parametrize(("images", "vocab", "top_k"), [(400, 72, 0), (400, 72, 9), (400, 32, 1), (40, 4096, 256)])
def test_guesses_are_tested_as_in_torch(coupling, budgets, images, vocab, top_k):
    (outcomes, right, following), found = both_ways(coupling, *windows(images, vocab, budgets, top_k))
    assert torch.equal(found[0], outcomes) and torch.equal(found[1], right)
    torch.testing.assert_close(found[2], following, rtol=1e-5, atol=1e-7)
    assert len(set(right.tolist())) > 2


def test_guided_guesses_are_tested_as_in_torch():
    logits, *others = windows(400, 72, None, 9)
    scales = torch.linspace(1, 5, logits[:, :, 0].numel()).view(logits.shape[:2])
    (outcomes, right, following), found = both_ways("maximal", logits.clamp(min=-20), *others, scales)
    assert torch.equal(found[0], outcomes) and torch.equal(found[1], right)
    torch.testing.assert_close(found[2], following, rtol=1e-4, atol=1e-6)
    control = both_ways("maximal", logits.clamp(min=-20), *others, scales.flip(1))[1][0]
    assert not torch.equal(control, outcomes)


@pytest.mark.parametrize("other", [{"coupling": "none"}, {"budgets": (0.4, None)}, {"top_k": 9}, {"seed": 6}], ids=str)
def test_every_setting_of_the_tests_is_seen(other):
    """Negative controls."""
    given = {"coupling": "maximal", "budgets": None, "top_k": 0, "seed": 5}
    outcomes = []
    for each in (given, {**given, **other}):
        parts = windows(400, 72, each["budgets"], each["top_k"], seed=each["seed"])
        outcomes.append(both_ways(each["coupling"], *parts)[1][0])
    assert not torch.equal(*outcomes)


def test_which_guesses_are_tested_in_c():
    logits = torch.zeros(2, 3, 72)
    assert backends.select_guess_outcomes(logits) is guess_outcomes
    assert backends.select_guess_outcomes(logits[..., :70]) is None
    assert backends.select_guess_outcomes(logits.bfloat16()) is None
    assert backends.select_guess_outcomes(torch.zeros(1, 1, 65544)) is None
    with backends.using("plain"):
        assert backends.select_guess_outcomes(logits) is None
