"""The distribution of a token by enumeration: lossless is exact, the strict rule keeps budgets, the authors' rule does
not."""

import pytest
import torch

from studio import StudioError
from studio.decoding.lantern import Relaxation, neighbour_table
from studio.decoding.verification import Acceptance, Lossless
from studio.reference.lantern import AuthorsRelaxation
from tests.decoding.distributions import distance, distribution_of_node, without_replacement

ROUNDING = 1e-6
LOSSLESS = Lossless()


def random_distribution(generator, vocab, sharpness=2.0):
    return (sharpness * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(dim=0)


def cases(count, vocab, seed):
    """`count` times: a distribution, a table of neighbours, siblings of rising number in random order."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        table = neighbour_table(torch.randn(vocab, 3, generator=generator), vocab - 1)
        tokens = torch.randperm(vocab, generator=generator)[: 1 + index % 5]
        yield random_distribution(generator, vocab), table, tokens


def deterministic_distribution(p, tokens, rule=LOSSLESS):
    return distribution_of_node(rule.probs(p[None], tokens[None]), tokens)


def sampled_distribution(p, q, siblings, rule=LOSSLESS):
    distribution = torch.zeros_like(p)
    for sampled, probability in without_replacement(q, siblings):
        tokens = torch.tensor(sampled)
        distribution += probability * distribution_of_node(rule.probs(p[None], tokens[None], q[None]), tokens)
    return distribution


def test_lossless_deterministic_drafts_are_exact():
    wrong = 0.0
    for p, _, tokens in cases(50, 24, seed=0):
        assert distance(deterministic_distribution(p, tokens), p) < ROUNDING
        acceptance = LOSSLESS.probs(p[None], tokens[None])
        distribution = distribution_of_node(Acceptance(acceptance.ratios, acceptance.tried, p[None]), tokens)
        wrong = max(wrong, distance(distribution, p))
    assert wrong > 0.05, "a next token from the distribution itself in place of the residual must be seen"


@pytest.mark.parametrize("siblings", [1, 2, 3])
def test_lossless_sampled_drafts_are_exact(siblings):
    generator, wrong = torch.Generator().manual_seed(1), 0.0
    for index in range(6):
        p, q = random_distribution(generator, 6), random_distribution(generator, 6)
        if index % 2:
            q[index % 6] = 0
            q /= q.sum()
        assert distance(sampled_distribution(p, q, siblings), p) < ROUNDING
        distribution = torch.zeros_like(p)
        for sampled, probability in without_replacement(q, siblings):
            tokens = torch.tensor(sampled)
            acceptance = LOSSLESS.probs(p[None], tokens[None], q[None])
            distribution += probability * distribution_of_node(
                Acceptance(acceptance.ratios, acceptance.tried, p[None]), tokens
            )
        wrong = max(wrong, distance(distribution, p))
    assert wrong > 0.05, "a next token from the distribution itself in place of the residual must be seen"


@pytest.mark.parametrize("delta", [0.0, 0.02, 0.1, 0.4])
def test_the_strict_rule_moves_at_most_its_budget(delta):
    farthest = authors = 0.0
    for p, table, tokens in cases(60, 24, seed=2):
        relaxation = Relaxation(table, 20, tv_budget=delta)
        moved = distance(deterministic_distribution(p, tokens, relaxation), p)
        assert moved <= delta + ROUNDING
        farthest = max(farthest, moved)
        reference = AuthorsRelaxation(table, 20, tv_budget=delta)
        authors = max(authors, distance(deterministic_distribution(p, tokens, reference), p))
    assert delta == 0 or farthest > delta / 2
    assert delta == 0 or authors > delta + 0.01, "the authors' rule must break the bound"


def test_one_sibling_moves_exactly_what_it_borrows():
    for p, table, tokens in cases(60, 24, seed=3):
        token, delta = int(tokens[0]), 0.2
        sums = p[table[token].long()].cumsum(dim=0)
        borrowed = float(torch.where(sums <= delta, sums, 0).max())
        relaxation = Relaxation(table, 23, tv_budget=delta)
        distribution = deterministic_distribution(p, tokens[:1], relaxation)
        assert distance(distribution, p) == pytest.approx(borrowed, abs=ROUNDING)
        assert float(distribution[token] - p[token]) == pytest.approx(borrowed, abs=ROUNDING)


def test_a_zero_budget_is_lossless_where_the_authors_is_not():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=torch.float64)
    table, tokens = torch.tensor([[3, 1, 4, 2]] * 5), torch.tensor([0])
    assert distance(deterministic_distribution(p, tokens, Relaxation(table, 1, tv_budget=0.0)), p) < ROUNDING
    reference = AuthorsRelaxation(table, 1, tv_budget=0.0)
    assert distance(deterministic_distribution(p, tokens, reference), p) > 0.1


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_the_ratio_bounds_every_token(ratio):
    largest = 0.0
    for p, table, tokens in cases(60, 24, seed=4):
        distribution = deterministic_distribution(p, tokens, Relaxation(table, 23, ratio_budget=ratio))
        largest = max(largest, float((distribution / p).max()))
        assert (distribution <= ratio * p + ROUNDING).all()
        assert distance(distribution, p) <= ratio - 1 + ROUNDING
    assert ratio == 1 or largest > 1 + (ratio - 1) / 2
    free = [deterministic_distribution(p, x, Relaxation(t, 23, tv_budget=1.0)) / p for p, t, x in cases(60, 24, seed=4)]
    assert max(float(distribution.max()) for distribution in free) > 3.1, "without the bound some token must pass it"


@pytest.mark.parametrize("siblings", [1, 2, 3])
@pytest.mark.parametrize(
    "budget", [{"tv_budget": 0.1}, {"ratio_budget": 1.4}, {"tv_budget": 0.4, "ratio_budget": 2.0}], ids=str
)
def test_sampled_drafts_keep_their_budgets(siblings, budget):
    generator, farthest, authors = torch.Generator().manual_seed(5), 0.0, 0.0
    for _ in range(6):
        p, q = random_distribution(generator, 6), random_distribution(generator, 6)
        table = neighbour_table(torch.randn(6, 3, generator=generator), 5)
        distribution = sampled_distribution(p, q, siblings, Relaxation(table, 5, **budget))
        allowed = min(budget.get("tv_budget", 1.0), budget.get("ratio_budget", 2.0) - 1)
        farthest = max(farthest, distance(distribution, p))
        assert distance(distribution, p) <= allowed + ROUNDING
        assert (distribution <= budget.get("ratio_budget", float("inf")) * p + ROUNDING).all()
        assert siblings > 1 or distance(distribution, p) <= distance(p, q) + ROUNDING
        single = dict([next(iter(budget.items()))])
        authors = max(authors, distance(sampled_distribution(p, q, siblings, AuthorsRelaxation(table, 5, **single)), p))
    assert farthest > 0.005
    assert len(budget) > 1 or "ratio_budget" in budget or authors > 0.15, "the authors' rule must break the bound"


def test_many_drafts_that_share_one_neighbour():
    p = torch.tensor([0.1, 0.9, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    q = torch.tensor([0.0, 0.0, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    table = torch.tensor([[1], [2], [0], [0], [0], [0]])
    authors = sampled_distribution(p, q, 2, AuthorsRelaxation(table, 1, tv_budget=0.1))
    assert distance(authors, p) > 0.5
    assert distance(sampled_distribution(p, q, 2, Relaxation(table, 1, tv_budget=0.1)), p) <= 0.1 + ROUNDING
    assert distance(sampled_distribution(p, q, 2, Relaxation(table, 1, ratio_budget=3.0)), p) < ROUNDING


def test_drafts_of_a_distribution_sharper_than_rounding():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    q = torch.tensor([1 - 2**-24, 1e-9, 3e-9, 2e-9])
    assert distance(sampled_distribution(p, q, 3), p) < ROUNDING


def test_siblings_in_any_order_and_padding():
    p, _, _ = next(cases(1, 24, seed=6))
    for tokens in ([3, 9, 4], [4, 3, 9], [3, 9, 4, -1, -1]):
        assert distance(deterministic_distribution(p, torch.tensor(tokens)), p) < ROUNDING
    both = LOSSLESS.probs(torch.stack((p, p)), torch.tensor([[3, 9], [5, -1]]))
    assert both.tried.tolist() == [[True, True], [True, False]]
    assert both.residual[1, 3] == p[3] and both.residual[1, 5] == 0


def test_all_mass_on_the_siblings():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    acceptance = LOSSLESS.probs(p[None], torch.tensor([[0, 1]]))
    assert acceptance.ratios.tolist() == [[0.5, 1.0]] and acceptance.residual.sum() > 0
    assert acceptance.residual[0, 2] == 0


def test_budgets_are_checked():
    table = neighbour_table(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), 5)
    for wrong in (
        {}, {"tv_budget": 1.1}, {"tv_budget": -0.1}, {"ratio_budget": 0.9}, {"ratio_budget": float("inf")},
    ):  # fmt: skip
        with pytest.raises(StudioError):
            Relaxation(table, 5, **wrong)
    with pytest.raises(StudioError, match="one bound"):
        AuthorsRelaxation(table, 5, tv_budget=0.1, ratio_budget=2.0)
    with pytest.raises(StudioError, match="width of the table"):
        Relaxation(table, 6, tv_budget=0.1)
    with pytest.raises(StudioError, match="1 to 5"):
        neighbour_table(torch.randn(6, 2), 6)


def test_neighbours_of_directions():
    codebook = torch.tensor([[1.0, 0.0], [9.0, 0.1], [1.0, 1.0], [0.9, 0.9]])
    assert neighbour_table(codebook, 1)[:, 0].tolist() == [1, 0, 3, 2]
    assert neighbour_table(codebook, 1, normalise=False)[0, 0] == 3
    assert neighbour_table(codebook, 1) is neighbour_table(codebook.clone(), 1)
