"""Jacobi decoding that tests its guesses: the distribution of tokens by enumeration, over tables of conditionals.

`decide` and `next_proposals` are the loop's own; every outcome of a test and every sample is expanded with its
probability. Distances are zero up to the rounding of float64.
"""

from collections import defaultdict
from itertools import product

import pytest
import torch

from studio.decoding.couplings import Chance, decide, next_proposals
from studio.decoding.lantern import Relaxation
from studio.decoding.sampling import sample_rows
from tests.decoding.distributions import distance

ROUNDING = 1e-12
GRID = 4
LINE = torch.tensor([[1, 2], [0, 2], [1, 0]])
"""The nearest codes of three codes on a line."""


def table(seed, vocab, total):
    """A model: a distribution, in `GRID`-ths, behind every prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for length in range(total) for prefix in product(range(vocab), repeat=length)]
    counts = torch.randint(vocab, (len(prefixes), GRID), generator=generator)
    return {prefix: row.bincount(minlength=vocab).double() / GRID for prefix, row in zip(prefixes, counts)}


def joint(model, vocab, total):
    """The joint distribution of `total` tokens, by tokens."""
    found = {}
    for tokens in product(range(vocab), repeat=total):
        found[tokens] = 1.0
        for place, token in enumerate(tokens):
            found[tokens] *= float(model[tokens[:place]][token])
    return found


class Forced:
    """Chance that takes a forced course in each row, and multiplies its probability into `probability` (B,)."""

    def __init__(self, levels, samples):
        self.levels, self.samples = levels, samples
        self.probability = torch.ones(len(levels), dtype=torch.float64)

    def test(self, share, *masses):
        bounds = [(mass / share).clamp(max=1) for mass in masses]
        edges = torch.stack([torch.zeros_like(share), *bounds, torch.ones_like(share)])
        rows = self.levels[None]
        self.probability *= (edges.gather(0, rows + 1) - edges.gather(0, rows))[0].prod(dim=1)
        return [self.levels <= number for number in range(len(masses))]

    def sample(self, weights):
        chances = weights / weights.sum(dim=2, keepdim=True)
        self.probability *= chances.gather(2, self.samples[:, :, None])[:, :, 0].prod(dim=1)
        return self.samples.clone()


class RelaxedBehind(Forced):
    """A mistake: guesses behind the first failure are relaxed, too."""

    def test(self, share, *masses):
        _, relaxed = super().test(share, *masses)
        return [relaxed, relaxed]


def courses(window, vocab):
    levels = list(product(range(3), repeat=window - 1))
    samples = list(product(range(vocab), repeat=window))
    pairs = list(product(levels, samples))
    return torch.tensor([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs])


def one_hot(token, vocab):
    return tuple(float(code == token) for code in range(vocab))


def start(model, vocab, window):
    """As the loop starts: a token of the model, and guesses that repeat it."""
    for token, chance in enumerate(model[()].tolist()):
        if chance:
            yield ((token,), (token,) * (window - 1), (one_hot(token, vocab),) * (window - 1)), chance


def enumerated(
    model, vocab, total, coupling, window, *, relaxation=None, chance=Forced, following=next_proposals, states=None
):
    """The joint distribution of the tokens that Jacobi decoding gives, by tokens."""
    levels, samples = courses(window, vocab)
    waiting, found = defaultdict(float), defaultdict(float)
    for state, probability in states or start(model, vocab, window):
        waiting[state] += probability
    while waiting:
        state = min(waiting, key=lambda each: len(each[0]))
        (committed, guesses, proposals), reached = state, waiting.pop(state)
        if len(committed) >= total:
            found[committed[:total]] += reached
            continue
        flat = torch.full((vocab,), 1 / vocab, dtype=torch.float64)
        rows = len(levels)
        distributions = torch.stack(
            [model.get((committed + guesses)[: len(committed) + i], flat) for i in range(window)]
        )
        distributions, tokens = distributions.expand(rows, -1, -1), torch.tensor(guesses).expand(rows, -1)
        q = torch.tensor(proposals, dtype=torch.float64).expand(rows, -1, -1)
        forced = chance(levels, samples)
        outcomes, right = decide(distributions, tokens, q, forced, coupling, relaxation)
        if following is next_proposals:
            new = following(distributions, outcomes, right)
        else:
            new = following(distributions, outcomes, right, q, levels)
        possible = forced.probability > 0
        columns = (outcomes, right, new.round(decimals=9), forced.probability * reached)
        for out, r, q_next, mass in zip(*(column[possible].tolist() for column in columns)):
            rest = (out[r + 1 :] + [out[-1]] * window)[: window - 1]
            waiting[(*committed, *out[: r + 1]), tuple(rest), tuple(map(tuple, q_next))] += mass
    return found


def apart(found, model, vocab, total):
    """Total variation from the model's joint distribution."""
    exact = joint(model, vocab, total)
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    return sum(abs(found.get(tokens, 0.0) - mass) for tokens, mass in exact.items()) / 2


def kept_proposals(distributions, outcomes, right, proposals, levels):
    """A mistake: a guess that passed behind the first failure keeps the distribution that it was sampled from."""
    new = next_proposals(distributions, outcomes, right)
    for row, first in enumerate((right + 1).tolist()):
        for place in range(first, proposals.shape[1]):
            if levels[row, place] == 0:
                new[row, place - first] = proposals[row, place]
    return new


@pytest.mark.parametrize(("vocab", "total", "window"), [(3, 3, 3), (2, 4, 4), (3, 4, 3)])
@pytest.mark.parametrize("coupling", ["none", "maximal"])
def test_tokens_have_the_models_distribution(coupling, vocab, total, window):
    for seed in range(4):
        model = table(seed, vocab, total)
        assert apart(enumerated(model, vocab, total, coupling, window), model, vocab, total) < ROUNDING * 1e3


def test_with_the_old_proposals_they_do_not():
    far = 0.0
    for seed in range(4):
        model = table(seed, 3, 3)
        far = max(far, apart(enumerated(model, 3, 3, "maximal", 3, following=kept_proposals), model, 3, 3))
    assert far > 0.05


def worked_example(following):
    half = {(): [0.5, 0.5, 0], (0,): [0.5, 0.5, 0], (1,): [0.5, 0, 0.5], (2,): [1, 0, 0]}
    model = {prefix: torch.tensor(distribution, dtype=torch.float64) for prefix, distribution in half.items()}
    third = (1 / 3,) * 3
    states = [(((), (0, code), (one_hot(0, 3), third)), 1 / 3) for code in range(3)]
    found = enumerated(model, 3, 2, "maximal", 3, states=states, following=following)
    behind_one = torch.tensor([found.get((1, code), 0.0) for code in range(3)], dtype=torch.float64)
    return (behind_one / behind_one.sum()).tolist(), apart(found, model, 3, 2)


def test_why_proposals_become_the_models():
    distribution, far = worked_example(next_proposals)
    assert distribution == pytest.approx([0.5, 0, 0.5]) and far < ROUNDING
    distribution, far = worked_example(kept_proposals)
    assert distribution == pytest.approx([2 / 3, 0, 1 / 3]) and far == pytest.approx(1 / 12)


def with_shared_noise(model, vocab, total, window, reuse):
    """As `enumerated` for guesses that each position's own number U makes, by the inverse of the distribution function.

    The race of "gumbel" is replaced by this coupling, which can be enumerated: U is one of `GRID` numbers. `reuse` is
    the mistake of sampling what replaces a rejected guess with the position's own number, too.
    """
    levels, samples = courses(window, vocab)
    waiting, found = defaultdict(float), defaultdict(float)
    for (committed, guesses, proposals), probability in start(model, vocab, window):
        waiting[committed, guesses, proposals, (None,) * (window - 1)] += probability
    while waiting:
        state = min(waiting, key=lambda each: len(each[0]))
        (committed, guesses, proposals, numbers), reached = state, waiting.pop(state)
        if len(committed) >= total:
            found[committed[:total]] += reached
            continue
        flat = torch.full((vocab,), 1 / vocab, dtype=torch.float64)
        prefixes = [(committed + guesses)[: len(committed) + i] for i in range(window)]
        distributions = torch.stack([model.get(prefix, flat) for prefix in prefixes])
        rows = len(levels)
        tokens, q = torch.tensor(guesses).expand(rows, -1), torch.tensor(proposals).double().expand(rows, -1, -1)
        forced = Forced(levels, samples)
        outcomes, right = decide(distributions.expand(rows, -1, -1), tokens, q, forced, "gumbel")
        new = next_proposals(distributions.expand(rows, -1, -1), outcomes, right)
        unused = [number is None for number in (*numbers, None)]
        grids = [range(GRID) if fresh else [number] for fresh, number in zip(unused, (*numbers, None))]
        choices = list(product(*grids))
        rest = (distributions[:-1] - q[0]).clamp(min=0)
        for chosen in choices:
            points = (torch.tensor(chosen).double() + 0.5) / GRID
            winners = [
                int(torch.searchsorted(distribution.cumsum(0), point))
                for distribution, point in zip(distributions, points)
            ]
            for row in (forced.probability > 0).nonzero()[:, 0].tolist():
                out, r = outcomes[row].tolist(), int(right[row])
                mass = float(forced.probability[row]) * reached / len(choices)
                if reuse and r < window - 1 and not unused[r]:
                    share = rest[r] / rest[r].sum()
                    mass *= float(int(torch.searchsorted(share.cumsum(0), points[r])) == out[r]) / float(share[out[r]])
                out = out[: r + 1] + winners[r + 1 :]
                following = (out[r + 1 :] + [out[-1]] * window)[: window - 1]
                q_next = [*distributions[r + 1 :].tolist(), *[one_hot(out[-1], vocab)] * window][: window - 1]
                assert q_next[: window - 1 - r] == new[row].tolist()[: window - 1 - r]
                kept = (chosen[r + 1 :] + (None,) * window)[: window - 1]
                key = (*committed, *out[: r + 1]), tuple(following), tuple(map(tuple, q_next)), kept
                waiting[key] += mass
    return found


def test_tokens_of_shared_noise_have_the_models_distribution():
    far, reused = 0.0, 0.0
    for seed in range(3):
        model = table(seed, 3, 3)
        far = max(far, apart(with_shared_noise(model, 3, 3, 2, False), model, 3, 3))
        reused = max(reused, apart(with_shared_noise(model, 3, 3, 2, True), model, 3, 3))
    assert far < 1e-9 and reused > 0.03


SAMPLES, SEED, CHI_SQUARE = 400_000, 3, 16.27
"""The last is the 0.999 quantile of chi-square with three degrees of freedom."""


def chi_square(tokens, p):
    expected = len(tokens) * p
    return float(((tokens.bincount(minlength=len(p)) - expected) ** 2 / expected).sum())


def windows_of(*distributions):
    return torch.stack(distributions).expand(SAMPLES, -1, -1)


def fresh(places, generator):
    """Random numbers for windows of some places."""
    return Chance(torch.rand(SAMPLES, 2 * places, generator=generator, dtype=torch.float64))


P, Q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])


def test_what_replaces_a_guess_needs_noise_of_its_own():
    """400,000 windows of one guess each, seed 3, level 0.001; with the guess's own noise the statistic is enormous."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.empty(SAMPLES, 2, 4).exponential_(generator=generator)
    guesses = sample_rows(windows_of(Q)[:, 0], noise=noise[:, 0])[:, None]
    chance, statistics = fresh(2, generator), []
    for reused in (False, True):
        if reused:
            chance.sample = lambda weights: sample_rows(weights.flatten(0, 1), noise=noise.flatten(0, 1)).view(-1, 2)
        outcomes, _ = decide(windows_of(P, P), guesses, windows_of(Q), chance, "gumbel")
        statistics.append(chi_square(outcomes[:, 0], P))
    assert statistics[0] < CHI_SQUARE and statistics[1] > 1000


def test_how_often_a_guess_stays():
    """Maximal coupling keeps a guess with probability 1 - TV(p, q), the race with shared noise as its formula says.

    400,000 windows, seed 3, four standard errors; independent samples stay far less often.
    """
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.empty(SAMPLES, 4).exponential_(generator=generator)
    guesses = sample_rows(windows_of(Q)[:, 0], noise=noise)
    failing, chance = torch.stack((torch.zeros_like(guesses), guesses), dim=1), fresh(3, generator)
    distributions, proposals = (
        windows_of(torch.tensor([0.0, 1, 0, 0]), P, P),
        windows_of(torch.tensor([1.0, 0, 0, 0]), Q),
    )
    expected = {
        "maximal": 1 - distance(P, Q),
        "gumbel": sum(1 / float(torch.maximum(P / P[a], Q / Q[a]).sum()) for a in range(4)),
        "none": float((P * Q).sum()),
    }
    kept = {name: decide(distributions, failing, proposals, chance, name)[0][:, 1] for name in ("maximal", "none")}
    kept["gumbel"] = sample_rows(windows_of(P)[:, 0], noise=noise)
    for name, probability in expected.items():
        error = (probability * (1 - probability) / SAMPLES) ** 0.5
        assert abs(float((kept[name] == guesses).float().mean()) - probability) < 4 * error, name
    assert expected["none"] < expected["gumbel"] < expected["maximal"]


def farthest(found, model, vocab, total):
    """The largest total variation from the model's conditional over all prefixes, and the largest ratio to it."""
    far, ratio = 0.0, 0.0
    for length in range(total):
        for prefix in product(range(vocab), repeat=length):
            distribution = torch.zeros(vocab, dtype=torch.float64)
            for tokens, mass in found.items():
                if tokens[:length] == prefix:
                    distribution[tokens[length]] += mass
            if distribution.sum() > 1e-9:
                distribution, p = distribution / distribution.sum(), model[prefix]
                far = max(far, distance(distribution, p))
                ratio = max(ratio, float((distribution / p).nan_to_num(0.0, 0.0, float("inf")).max()))
    return far, ratio


def smooth_table(seed, vocab, total):
    """A model whose conditionals are above 0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for length in range(total) for prefix in product(range(vocab), repeat=length)]
    return {prefix: (1.5 * torch.randn(vocab, generator=generator).double()).softmax(0) for prefix in prefixes}


DELTA, RATIO, MODELS = 0.2, 1.5, 24


def worst(relaxation, chance=Forced):
    """The largest total variation and ratio over all models, prefixes and tokens."""
    found = []
    for seed in range(MODELS):
        model = smooth_table(seed, 3, 3)
        tokens = enumerated(model, 3, 3, "maximal", 3, relaxation=relaxation, chance=chance)
        found.append(farthest(tokens, model, 3, 3))
    return [max(column) for column in zip(*found)]


def test_relaxed_tests_move_a_token_by_delta_at_most(monkeypatch):
    relaxation = Relaxation(LINE, 2, DELTA)
    assert 0.8 * DELTA < worst(relaxation)[0] <= DELTA + 1e-6
    assert worst(relaxation, RelaxedBehind)[0] > DELTA + 0.01
    borrowed_mass = Relaxation.borrowed_mass
    monkeypatch.setattr(Relaxation, "borrowed_mass", lambda how, p, x, share: borrowed_mass(how, p, x, share * 0 + 1))
    assert worst(relaxation)[0] > DELTA + 0.01


def test_relaxed_tests_make_no_token_likelier_than_the_ratio_says():
    assert 1.2 < worst(Relaxation(LINE, 2, None, RATIO))[1] <= RATIO + 1e-6


def test_a_relaxed_test_is_that_of_a_tree_of_one_draft():
    generator = torch.Generator().manual_seed(SEED)
    p, q = (2 * torch.randn(2, 64, 3, generator=generator)).softmax(dim=2)
    x = torch.randint(3, (64,), generator=generator)
    share, own = (distribution.gather(1, x[:, None])[:, 0] for distribution in (q, p))
    for budgets in ((DELTA, None), (None, RATIO), (DELTA, RATIO)):
        relaxation = Relaxation(LINE, 2, *budgets)
        ratio = (own + relaxation.borrowed_mass(p, x, share)) / share
        assert torch.allclose(ratio, relaxation.probs(p, x[:, None], q).ratios[:, 0], atol=1e-6)
