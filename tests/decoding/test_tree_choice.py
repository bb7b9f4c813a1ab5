"""Trees chosen by cost, against the best of all small trees."""

from itertools import combinations

import pytest
import torch

from studio import StudioError
from studio.decoding.trees import StaticTree, choose_tree, default_tree

ACCEPTANCE = (0.5, 0.2, 0.1)
FREE = {nodes: 1.0 + 0.001 * nodes for nodes in range(1, 6)}
DEAR = {nodes: 1.0 + 0.3 * (nodes - 1) for nodes in range(1, 6)}


def speed(paths, acceptance, verify_seconds, level_seconds):
    expected = 1.0
    for path in paths:
        probability = 1.0
        for rank in path:
            probability *= acceptance[rank]
        expected += probability
    return expected / (verify_seconds[len(paths) + 1] + level_seconds * max(map(len, paths)))


def all_trees(most_nodes, ranks, levels):
    paths = [()]
    for _ in range(levels):
        paths += [(*path, rank) for path in paths for rank in range(ranks) if (*path, rank) not in paths]
    for count in range(1, most_nodes):
        for chosen in combinations(paths[1:], count):
            try:
                yield StaticTree(chosen)
            except StudioError:
                continue


@pytest.mark.parametrize("verify_seconds", [FREE, DEAR], ids=["free", "dear"])
@pytest.mark.parametrize("level_seconds", [0.0, 0.05, 0.3])
def test_no_other_tree_is_faster(verify_seconds, level_seconds):
    tree = choose_tree(ACCEPTANCE, verify_seconds, level_seconds=level_seconds, most_levels=2)
    costs = (ACCEPTANCE, verify_seconds, level_seconds)
    best = max(speed(other.paths, *costs) for other in all_trees(5, 3, 2))
    if tree is None:
        assert best <= 1 / verify_seconds[1]
    else:
        assert speed(tree.paths, *costs) == pytest.approx(best) and best > 1 / verify_seconds[1]


def test_cheap_nodes_make_large_trees_and_dear_ones_none():
    assert choose_tree(ACCEPTANCE, FREE).nodes == 5
    assert choose_tree(ACCEPTANCE, DEAR).nodes < 5
    assert choose_tree((0.2,), DEAR) is None
    assert choose_tree((0.9,), FREE).paths == ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))
    assert choose_tree((0.9,), FREE, level_seconds=0.8).levels < 4


def test_defaults_by_device():
    assert default_tree(torch.device("cpu")).nodes in range(3, 9)
    assert default_tree(torch.device("cuda")).nodes == 59
    fixed = [default_tree(torch.device(name), sampled=True) for name in ("cpu", "cuda")]
    assert [tree.nodes for tree in fixed] == [6, 25] and all(isinstance(tree, StaticTree) for tree in fixed)


@pytest.mark.parametrize(
    "wrong", [((), FREE), ((0.9, 0.2), FREE), ((-0.1,), FREE), ((0.5,), {2: 1.0}), ((0.5,), {1: 0.0})]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(StudioError):
        choose_tree(*wrong)
