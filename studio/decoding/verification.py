"""From draft trees to accepted tokens: walks down from the root along the siblings that pass (`acceptance`).

Target logits of all nodes are there already; only nodes that the walk visits are filtered and weighed. The walk waits
for the device once a level, never for a single draft.
"""

from dataclasses import dataclass, field

import torch

from studio.decoding.acceptance import Relaxation, acceptance_probs, relaxed_mass
from studio.decoding.sampling import Sampling
from studio.decoding.trees import Tree


@dataclass
class Verdict:
    """What was accepted in each of B trees.

    `paths` (B lists) hold the root's and the accepted nodes' numbers; `distribution` (B, V) is what the next token
    comes from,
    None when greedy: the likeliest behind the last node of the path; `ratios` (B lists) are those of the tests, in the
    order in which they were made.
    """

    paths: list[list[int]]
    distribution: torch.Tensor | None = None
    ratios: list[list[float]] = field(default_factory=list)

    @property
    def last(self) -> list[int]:
        """The last accepted node of each tree."""
        return [path[-1] for path in self.paths]


def verify(
    tree: Tree,
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    sampling: Sampling,
    relaxation: Relaxation | None = None,
) -> Verdict:
    """Accepts drafts so that tokens follow the target's distribution, or stay near it (see `acceptance`).

    Args:
        tree: trees of B images with n nodes.
        logits: the target's (B, n, V) at every node, guided, before filters.
        uniforms: numbers (B, at least n - 1) from [0, 1), used in order, one for each test.
        sampling: temperature and filters; not greedy.
    """
    batch, _, vocab = logits.shape
    paths, ratios = [[0] for _ in range(batch)], [[] for _ in range(batch)]
    distribution = logits.new_empty(batch, vocab, dtype=torch.float32)
    numbers, walking = [iter(row) for row in uniforms.tolist()], list(range(batch))
    while walking:
        nodes = [paths[row][-1] for row in walking]
        p = sampling.probabilities(_at(logits, walking, nodes))
        children = [tree.children[row][node] for row, node in zip(walking, nodes)]
        if not any(children):
            _put(distribution, walking, p)
            break
        q = None
        if tree.proposals is not None:
            q = _at(tree.proposals, walking, tree.proposal_rows[nodes].clamp(min=0).tolist())
        weighed = acceptance_probs(p, _tokens(tree, walking, children), q, relaxation)
        ended, onward = [], []
        for place, (row, tried, chances) in enumerate(zip(walking, weighed.tried.tolist(), weighed.ratios.tolist())):
            passed = None
            for child, chance in [pair for pair, made in zip(zip(children[place], chances), tried) if made]:
                ratios[row].append(chance)
                if next(numbers[row]) <= chance:
                    passed = child
                    break
            if passed is None:
                ended.append(place)
            else:
                paths[row].append(passed)
                onward.append(row)
        if ended:
            rest = weighed.rest if len(ended) == len(walking) else weighed.rest[ended]
            _put(distribution, [walking[place] for place in ended], rest)
        walking = onward
    return Verdict(paths, distribution / distribution.sum(dim=1, keepdim=True), ratios)


def verify_greedy(tree: Tree, logits: torch.Tensor, relaxation: Relaxation | None = None) -> Verdict:
    """Accepts every draft that is the likeliest token behind an accepted node; the longest path counts.

    Relaxed, a draft counts with what it may borrow (each on its own), and its neighbours keep what they have, so
    several siblings may pass; of equally long paths the one with the first leaf wins. Arguments as of `verify`.
    """
    batch = len(logits)
    best, accepted = [0] * batch, [(row, 0) for row in range(batch)]
    leaves = [_first_leaves(children) for children in tree.children]
    while accepted := [(row, node) for row, node in accepted if tree.children[row][node]]:
        rows, nodes = zip(*accepted)
        children = [tree.children[row][node] for row, node in accepted]
        passed = is_likeliest(_at(logits, rows, nodes), _tokens(tree, rows, children), relaxation).tolist()
        accepted = [
            (row, child)
            for row, below, marks in zip(rows, children, passed)
            for child, mark in zip(below, marks)
            if mark
        ]
        longest = {}
        for row, node in accepted:
            if row not in longest or leaves[row][node] < leaves[row][longest[row]]:
                longest[row] = node
        for row, node in longest.items():
            best[row] = node
    parents = tree.parents.tolist()
    return Verdict([_path_to(node, parents[row]) for row, node in enumerate(best)])


def _at(values: torch.Tensor, rows, nodes) -> torch.Tensor:
    """values[rows, nodes] of a tensor (B, n, V)."""
    if len(values) == len(rows) == 1:
        return values[:, nodes[0]]
    return values[torch.tensor(rows, device=values.device), torch.tensor(nodes, device=values.device)]


def _put(distribution: torch.Tensor, rows: list[int], values: torch.Tensor) -> None:
    if len(rows) == len(distribution):
        distribution.copy_(values)
    else:
        distribution[torch.tensor(rows, device=distribution.device)] = values


def _tokens(tree: Tree, rows, children: list[list[int]]) -> torch.Tensor:
    """Tokens (R, c) of some nodes' children, in order, then -1."""
    width, drafted = max(map(len, children)), tree.token_lists
    table = [
        [drafted[row][child] for child in below] + [-1] * (width - len(below)) for row, below in zip(rows, children)
    ]
    return torch.tensor(table, device=tree.tokens.device)


def is_likeliest(logits: torch.Tensor, tokens: torch.Tensor, relaxation: Relaxation | None) -> torch.Tensor:
    """Which tokens (R, c), -1 where there is none, would be sampled behind R nodes if they held what they may
    borrow."""
    likeliest = tokens == logits.argmax(dim=-1)[:, None]
    if relaxation is None:
        return likeliest
    p = logits.float().softmax(dim=-1)
    top, places = p.topk(2, dim=-1)
    others = torch.where(tokens == places[:, :1], top[:, 1:], top[:, :1])
    flat = p.repeat_interleave(tokens.shape[1], dim=0)
    held = relaxed_mass(flat, tokens.clamp(min=0).flatten(), relaxation).view_as(others)
    return ((held > others) | likeliest) & (tokens >= 0)


def _first_leaves(children: list[list[int]]) -> list[int]:
    """Number of the first leaf at or below each node."""
    first = list(range(len(children)))
    for node in reversed(first):
        if children[node]:
            first[node] = min(first[child] for child in children[node])
    return first


def _path_to(node: int, parents: list[int]) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
