"""Default trees, against the best of all small trees."""

from itertools import combinations
from math import prod

import pytest
import torch

from studio import StudioError
from studio.decoding.trees import SUPPOSED_ACCEPTANCE, StaticTree, default_tree


def expected_tokens(paths):
    """Accepted drafts of a tree by the supposed acceptance of each child."""
    return sum(prod(SUPPOSED_ACCEPTANCE[rank] for rank in path) for path in paths)


def all_trees(nodes, ranks, levels):
    paths = [()]
    for _ in range(levels):
        paths += [(*path, rank) for path in paths for rank in range(ranks) if (*path, rank) not in paths]
    for chosen in combinations(paths[1:], nodes - 1):
        try:
            yield StaticTree(chosen)
        except StudioError:
            continue


def test_no_other_tree_of_that_size_is_expected_to_bring_more():
    tree = default_tree(torch.device("cpu"), sampled=True)
    others = [expected_tokens(other.paths) for other in all_trees(tree.nodes, 4, tree.levels)]
    assert expected_tokens(tree.paths) == pytest.approx(max(others)) and min(others) < max(others) - 0.1


def test_defaults_by_device():
    assert default_tree(torch.device("cpu")).nodes in range(3, 9)
    assert default_tree(torch.device("cuda")).nodes == 59
    fixed = [default_tree(torch.device(name), sampled=True) for name in ("cpu", "cuda")]
    assert [tree.nodes for tree in fixed] == [6, 25] and all(isinstance(tree, StaticTree) for tree in fixed)
