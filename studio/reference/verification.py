"""Verification as LANTERN's authors write it (arXiv:2410.03355): the slow, plain reference of tests and benchmarks.

Logits are gathered along every path from the root to a leaf; candidates are tried in Python, each with a number fetched
from the device, and the distribution is renormalised after each failure. Deterministic drafts, the authors' rule or
lossless; the results are those of `studio.decoding.verification.verify`.
"""

from typing import Any

import torch

from studio.decoding.sampling import Sampling
from studio.decoding.trees import Tree
from studio.decoding.verification import Lossless
from studio.reference.lantern import AuthorsRelaxation


def leaf_paths(tree: Tree) -> torch.Tensor:
    """The first image's paths (leaves, levels + 1) from the root to each leaf, then -1, elder siblings first."""
    parents = tree.parents[0].tolist()
    paths = []
    for leaf in sorted(set(range(len(parents))) - {parent for parent in parents if parent >= 0}):
        path, node = [], leaf
        while node >= 0:
            path.append(node)
            node = parents[node]
        if path[-1] == 0:
            paths.append(path[::-1])
    longest = max(map(len, paths))
    return torch.tensor([path + [-1] * (longest - len(path)) for path in sorted(paths)])


def textbook_verify(
    paths: torch.Tensor,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    uniforms: list[float],
    sampling: Sampling,
    rule: AuthorsRelaxation | Lossless,
) -> tuple[list[int], torch.Tensor]:
    """The accepted tokens behind the root, and the distribution (V,) of the next one.

    Args:
        paths: as of `leaf_paths`.
        tokens: of the nodes (n,).
        logits: the target's (n, V) at every node.
        uniforms: used in order, one for each test.
    """
    along = logits[paths]
    candidates = torch.where(paths >= 0, tokens[paths], -1)
    accepted, used, failed = [int(tokens[0])], 0, False
    path = 0
    for level in range(1, paths.shape[1]):
        if level != len(accepted):
            break
        failed = False
        fits = (candidates[:, :level] == torch.tensor(accepted)).all(dim=1)
        path = int(torch.nonzero(fits)[0, 0])
        distribution = sampling.probabilities(along[path, level - 1][None])[0]
        seen = set()
        for row in range(len(paths)):
            x = int(candidates[row, level])
            if not fits[row] or x in seen or x == -1:
                continue
            seen.add(x)
            near, count, ratio = torch.empty(0, dtype=torch.long), 0, distribution[x]
            if isinstance(rule, AuthorsRelaxation):
                near = rule.neighbours[x].long()
                sums = distribution[near[: rule.k]].cumsum(dim=0)
                most: Any = rule.tv_budget
                if rule.tv_budget is None:
                    assert rule.ratio_budget is not None
                    most = (rule.ratio_budget - 1) * distribution[x]
                count = int((sums <= most).sum()) if most != 1 else rule.k
                if count:
                    ratio = ratio + sums[count - 1]
            number, used = uniforms[used], used + 1
            if number <= ratio:
                accepted.append(x)
                path = row
                break
            distribution[x] = 0
            if count and isinstance(rule, AuthorsRelaxation):
                distribution[near[: rule.k + 1]] = 0
            if distribution.sum() == 0:
                distribution = torch.ones_like(distribution)
            distribution = distribution / distribution.sum()
            failed = True
    if not failed or len(accepted) == paths.shape[1]:
        distribution = sampling.probabilities(along[path, len(accepted) - 1][None])[0]
    return accepted[1:], distribution
