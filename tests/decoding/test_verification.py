"""Walks down a tree: joint distributions of two and three tokens by enumeration, the plain reference, greedy paths."""

from itertools import product

import pytest
import torch

from studio import StudioError
from studio.bench.verify import bench_verify
from studio.decoding.lantern import Relaxation, neighbour_table
from studio.decoding.sampling import Sampling
from studio.decoding.trees import DynamicTree, StaticTree, Tree, grow, trees_of
from studio.decoding.verification import Lossless, verify, verify_greedy
from studio.reference.lantern import AuthorsRelaxation
from studio.reference.verification import leaf_paths, textbook_verify
from tests.decoding.distributions import distance, without_replacement

V, LENGTH = 4, 3
PASS, FAIL = -1.0, 2.0


class Language:
    """A random distribution of three tokens: `logits[prefix]` (V,) are those of the token behind a prefix."""

    def __init__(self, seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = {
            prefix: 2 * torch.randn(V, generator=generator)
            for length in range(LENGTH)
            for prefix in product(range(V), repeat=length)
        }
        self.sampling = Sampling(temperature=temperature, top_k=3)

    def distribution(self, prefix):
        return self.sampling.probabilities(self.logits[prefix][None])[0]

    def joint(self):
        distribution = torch.ones(V**LENGTH, dtype=torch.float64)
        for index, sequence in enumerate(product(range(V), repeat=LENGTH)):
            for length in range(LENGTH):
                distribution[index] *= float(self.distribution(sequence[:length])[sequence[length]])
        return distribution


def prefixes_of(tree):
    """What stands behind the root at each node; the root is an unseen token before the first."""
    paths = {0: ()}
    for node, (token, parent) in enumerate(zip(tree.tokens[0].tolist(), tree.parents[0].tolist())):
        if parent >= 0:
            paths[node] = (*paths[parent], token)
    return [paths[node] for node in range(len(paths))]


def outcomes(tree, language, *, spoil=False):
    """`[(tokens, distribution of the next token, probability)]` over all ends of the tests of one tree."""
    logits = torch.stack([language.logits[prefix] for prefix in prefixes_of(tree)])[None]
    found, pending = [], [([], 1.0)]
    while pending:
        forced, probability = pending.pop()
        numbers = torch.full((1, tree.tokens.shape[1]), FAIL)
        numbers[0, : len(forced)] = torch.tensor(forced)
        result = verify(tree, logits, numbers, language.sampling, Lossless())
        ratios = [min(1.0, ratio) for ratio in result.ratios[0]]
        for place in range(len(forced), len(ratios)):
            chance = probability * ratios[place]
            if chance > 0:
                pending.append(([*forced, *[FAIL] * (place - len(forced)), PASS], chance))
            probability *= 1 - ratios[place]
        tokens = tuple(tree.tokens[0, result.paths[0][1:]].tolist())
        distribution = language.distribution(tokens) if spoil else result.distribution[0]
        found.append((tokens, distribution, probability))
    return found


def joint_distribution(trees, language, **how):
    """The joint distribution of three tokens when each round verifies one of `trees` (with probabilities), then plain
    samples."""
    distribution = torch.zeros(V**LENGTH, dtype=torch.float64)
    for tree, chance in trees:
        for tokens, following, probability in outcomes(tree, language, **how):
            for last in range(V):
                spread(distribution, language, (*tokens, last), chance * probability * float(following[last]))
    return distribution


def spread(distribution, language, tokens, probability):
    if probability == 0:
        return
    if len(tokens) == LENGTH:
        index = sum(token * V ** (LENGTH - 1 - place) for place, token in enumerate(tokens))
        distribution[index] += probability
        return
    for token, share in enumerate(language.distribution(tokens).tolist()):
        spread(distribution, language, (*tokens, token), probability * share)


def test_the_joint_distribution_of_deterministic_drafts():
    wrong = 0.0
    for seed, rows in enumerate((
        ([0, 1, 2, 3, 0], [-1, 0, 0, 1, 1]),
        ([0, 2, 0, 1, 1, 3], [-1, 0, 0, 0, 1, 2]),
        ([0, 3, 3], [-1, 0, 1]),
        ([0], [-1]),
    )):  # fmt: skip
        language, tree = Language(seed), trees_of([rows], "cpu")
        assert distance(joint_distribution([(tree, 1.0)], language), language.joint()) < 1e-6
        wrong = max(wrong, distance(joint_distribution([(tree, 1.0)], language, spoil=True), language.joint()))
    assert wrong > 0.02, "a next token from the distribution itself in place of the residual must be seen"


def test_the_joint_distribution_of_sampled_drafts():
    language, generator = Language(7), torch.Generator().manual_seed(3)
    shape = StaticTree(((0,), (1,), (0, 0), (0, 1)))
    first, second = torch.randn(2, V, generator=generator).softmax(dim=-1)
    first[2], second[0] = 0, 0
    first, second = first / first.sum(), second / second.sum()
    rows = torch.tensor([0, 1, -1, -1, -1])
    trees = []
    for above, chance in without_replacement(first, 2):
        for below, share in without_replacement(second, 2):
            tokens = torch.tensor([[0, *above, *below]])
            proposals = torch.stack((first, second))[None]
            trees.append((Tree(tokens, torch.tensor([shape.parents]), proposals, rows), chance * share))
    assert sum(chance for _, chance in trees) == pytest.approx(1)
    assert distance(joint_distribution(trees, language), language.joint()) < 1e-6
    assert distance(joint_distribution(trees, language, spoil=True), language.joint()) > 0.02


def random_tree(generator, shape, vocab, batch=1):
    def behind(*size):
        return (4 * torch.randn(*size, vocab, generator=generator)).log_softmax(dim=-1)

    roots, max_depth = torch.zeros(batch, dtype=torch.long), torch.full((batch,), shape.levels)
    return grow(shape, roots, behind(batch), lambda tokens, _: behind(*tokens.shape), max_depth)


@pytest.mark.parametrize("relaxed", [False, True])
def test_equals_the_textbook(relaxed):
    generator = torch.Generator().manual_seed(0)
    table = neighbour_table(torch.randn(40, 3, generator=generator), 12)
    for budget in ({"tv_budget": 0.2}, {"ratio_budget": 3.0}, {"tv_budget": 1.0}):
        rule = AuthorsRelaxation(table, 8, **budget) if relaxed else Lossless()
        lengths = set()
        for _ in range(20):
            tree = random_tree(generator, DynamicTree(nodes=16, levels=3, width=4), 40)
            n = tree.tokens.shape[1]
            logits, numbers = 4 * torch.randn(n, 40, generator=generator), torch.rand(1, n, generator=generator)
            logits[torch.arange(n - 1), tree.tokens[0, 1:]] += 4
            result = verify(tree, logits[None], numbers, Sampling(top_k=30), rule)
            accepted, distribution = textbook_verify(
                leaf_paths(tree), tree.tokens[0], logits, numbers[0].tolist(), Sampling(top_k=30), rule
            )
            assert tree.tokens[0, result.paths[0][1:]].tolist() == accepted
            torch.testing.assert_close(result.distribution[0], distribution, atol=1e-6, rtol=1e-5)
            lengths.add(len(accepted))
        assert len(lengths) > 1


def test_a_batch_equals_its_single_trees():
    generator = torch.Generator().manual_seed(1)
    table = neighbour_table(torch.randn(40, 3, generator=generator), 12)
    trees = random_tree(generator, DynamicTree(nodes=12, levels=3, width=3), 40, batch=6)
    logits, numbers = 3 * torch.randn(6, 12, 40, generator=generator), torch.rand(6, 12, generator=generator)
    numbers *= 0.3
    for rule in (Lossless(), Relaxation(table, 8, tv_budget=0.3)):
        for greedy in (False, True):

            def call(tree, logits, numbers, greedy=greedy, rule=rule):
                if greedy:
                    return verify_greedy(tree, logits, rule)
                return verify(tree, logits, numbers, Sampling(), rule)

            together = call(trees, logits, numbers)
            assert len(set(map(len, together.paths))) > 1
            for row in range(6):
                one = slice(row, row + 1)
                alone = call(Tree(trees.tokens[one], trees.parents[one]), logits[one], numbers[one])
                assert alone.paths == [together.paths[row]]
                assert alone.distribution is None or torch.equal(alone.distribution[0], together.distribution[row])


def test_the_greedy_path_is_the_likeliest():
    generator = torch.Generator().manual_seed(2)
    lengths = set()
    for _ in range(20):
        tree = random_tree(generator, DynamicTree(nodes=20, levels=4, width=4), 8)
        logits = torch.randn(1, tree.tokens.shape[1], 8, generator=generator)
        logits[0, tree.parents[0, 1:], tree.tokens[0, 1:]] += 1.5
        node, path = 0, [0]
        while True:
            below = [n for n in range(tree.tokens.shape[1]) if tree.parents[0, n] == node]
            node = next((n for n in below if tree.tokens[0, n] == logits[0, node].argmax()), None)
            if node is None:
                break
            path.append(node)
        result = verify_greedy(tree, logits, Lossless())
        assert result.paths == [path] and result.last == path[-1:]
        lengths.add(len(path))
    assert len(lengths) > 2


def test_no_node_without_its_parent():
    """Log-probabilities that round to 0 tie a child with its parent."""
    generator = torch.Generator().manual_seed(3)
    roots, max_depth = torch.zeros(2, dtype=torch.long), torch.tensor([4, 2])

    def sure(*size):
        return (400 * torch.randn(*size, 12, generator=generator)).log_softmax(dim=-1)

    for _ in range(30):
        tree = grow(DynamicTree(9, 4, 3), roots, sure(2), lambda tokens, _: sure(*tokens.shape), max_depth)
        rising = torch.arange(tree.parents.shape[1])
        assert (tree.parents < rising).all() and (tree.parents[:, 0] == -1).all()
        existing = tree.parents[:, 1:] >= 0
        above = tree.parents[:, 1:].clamp(min=0)
        assert ((above == 0) | (tree.parents.gather(1, above) >= 0))[existing].all()
        assert tree.depths[1].max() <= 2 and tree.depths[0].max() <= 4


def test_static_trees_are_checked():
    shape = StaticTree(((0, 0), (1,), (0,), (0, 1)))
    assert shape.paths == ((0,), (1,), (0, 0), (0, 1))
    assert (shape.parents, shape.levels, shape.width, shape.expanded) == ([-1, 0, 0, 1, 1], 2, 2, [0, 1])
    for paths in ((), ((1,),), ((0,), (0,)), ((0,), (1, 0)), ((),)):
        with pytest.raises(StudioError):
            StaticTree(paths)
    for wrong in ({"nodes": 1}, {"levels": 0}, {"width": True}):
        with pytest.raises(StudioError):
            DynamicTree(**wrong)


def test_benchmark():
    times = bench_verify(vocab=64, nodes=12, k=8, trees=2, repeats=1)
    assert set(times) == {"ms", "reference_ms"} and min(times.values()) > 0
    with pytest.raises(StudioError, match="1 to 63"):
        bench_verify(vocab=64, nodes=12, k=64, trees=1)
