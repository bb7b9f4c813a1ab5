"""Verification of trees of drafts: which path is accepted, and what the next token is sampled from.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), over trees (SpecInfer,
arXiv:2305.09781). At a node of the tree, the siblings x_1, x_2, ... are tried in order against the target's
distribution p. Sibling j passes with probability `ratios[j]`, given that all before it failed; when all fail, the next
token comes from `residual`. With `Lossless`, the token that comes out has distribution p:

- Deterministic drafts, as of a dynamic tree (EAGLE-2, arXiv:2406.16858): the ratio is p(x) over the mass not yet tried.
- Drafts sampled from a distribution q without replacement, as of a static tree (several rounds, arXiv:2305.09781 and
  2402.14160): the ratio is p(x) / q(x) with q renormalised over the tokens left, and after a failure p becomes
  max(p - q, 0), renormalised. What is left of q is summed, not taken from 1, which would lose the tail of a sharp q.

Other rules of acceptance, such as LANTERN's, implement `AcceptanceRule`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from studio.decoding.sampling import Sampling
from studio.decoding.trees import Tree

_TINY = 1e-12


@dataclass
class Acceptance:
    """The siblings below R nodes: `ratios` (R, c), which are `tried` (R, c) at all, and the `residual` (R, V).

    A sibling passes when a uniform number is at most its ratio; `residual` need not sum to 1.
    """

    ratios: torch.Tensor
    tried: torch.Tensor
    residual: torch.Tensor


class AcceptanceRule(Protocol):
    """Which drafts stand in for the target's own tokens."""

    def probs(self, p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor | None = None) -> Acceptance:
        """Acceptance probabilities of the siblings below R nodes, computed together.

        Args:
            p: the target's distributions (R, V) there, after all filters.
            tokens: siblings (R, c) in the order in which they are tried, distinct; -1 where there is none.
            q: the distributions (R, V) that they were sampled from without replacement; None for deterministic drafts.
        """

    def is_likeliest(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens (R, c), -1 where there is none, greedy decoding accepts behind nodes with logits (R, V)."""


class Lossless:
    """The rule that keeps the target's distribution."""

    def probs(self, p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor | None = None) -> Acceptance:
        if q is None:
            tried, x = tokens >= 0, tokens.clamp(min=0)
            gains = p.gather(1, x) * tried
            return Acceptance(ratios_in_turn(p, gains), tried, or_else(p.scatter_add(1, x, -gains), p))
        ratios, tests = [p.new_zeros(len(p), 0)], [tokens.new_zeros(len(p), 0).bool()]
        for token in tokens.split(1, 1):
            share, proposal, q = take_proposal(q, token)
            ratios.append(p.gather(1, token.clamp(min=0)) / share.clamp(min=_TINY))
            tests.append(share > 0)
            p = torch.where(share > 0, residual(p, proposal), p)
        return Acceptance(torch.cat(ratios, dim=1), torch.cat(tests, dim=1), p)

    def is_likeliest(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return tokens == logits.argmax(dim=-1)[:, None]


def ratios_in_turn(p: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Acceptance probabilities (R, c) of deterministic siblings that hold the masses `gains` (R, c) of p (R, V)."""
    reached = gains.double()
    reached = p.sum(1, keepdim=True, dtype=torch.float64) - (reached.cumsum(1) - reached)
    return gains / reached.clamp(min=_TINY)


def take_proposal(q: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sibling (R, 1) out of the mass q (R, V) that is left: its probability, q normalised, and q without it.

    The probability (R, 1) is 0 where there is no sibling, -1, and where nothing of q is left.
    """
    exists, token = token >= 0, token.clamp(min=0)
    mass, left = q.gather(1, token), q.sum(1, keepdim=True)
    share = (mass / left).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * exists
    return share, (q / left).nan_to_num(0.0, 0.0, 0.0), q.scatter_add(1, token, -mass * exists)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """max(p - q, 0), normalised, of distributions (R, V); p where rounding left nothing of it."""
    left = or_else((p - q).clamp(min=0), p)
    return left / left.sum(1, keepdim=True)


def or_else(distribution: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`distribution` (R, V), or the one before where rounding left nothing of it."""
    return torch.where(distribution.sum(1, keepdim=True) > 0, distribution, before)


@dataclass
class VerifyResult:
    """What was accepted in each of B trees.

    `paths` (B lists) hold the root's and the accepted nodes' numbers; `distribution` (B, V) is what the next token
    comes from, None when greedy: the likeliest behind the last node of the path; `ratios` (B lists) are those of the
    tests, in the order in which they were made.
    """

    paths: list[list[int]]
    distribution: torch.Tensor | None = None
    ratios: list[list[float]] = field(default_factory=list)

    @property
    def last(self) -> list[int]:
        """The last accepted node of each tree."""
        return [path[-1] for path in self.paths]


def verify(
    tree: Tree, logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling, rule: AcceptanceRule
) -> VerifyResult:
    """Walks down from the root along the siblings that pass, waiting for the device once a level.

    Args:
        tree: trees of B images with n nodes.
        logits: the target's (B, n, V) at every node, guided, before filters; those that the walk visits are filtered.
        uniforms: numbers (B, at least n - 1) from [0, 1), used in order, one for each test.
        sampling: temperature and filters; not greedy.
        rule: how siblings are accepted.
    """
    batch, _, vocab = logits.shape
    paths: list[list[int]] = [[0] for _ in range(batch)]
    ratios: list[list[float]] = [[] for _ in range(batch)]
    distribution = logits.new_empty(batch, vocab, dtype=torch.float32)
    numbers, walking = [iter(row) for row in uniforms.tolist()], list(range(batch))
    while walking:
        nodes = [paths[row][-1] for row in walking]
        p = sampling.probabilities(_at(logits, walking, nodes))
        children = [tree.children[row][node] for row, node in zip(walking, nodes)]
        if not any(children):
            _write_rows(distribution, walking, p)
            break
        q = None
        if tree.proposals is not None and tree.proposal_rows is not None:
            q = _at(tree.proposals, walking, tree.proposal_rows[nodes].clamp(min=0).tolist())
        acceptance = rule.probs(p, tree.tokens_at(walking, children), q)
        ended, onward = [], []
        tested = zip(walking, acceptance.tried.tolist(), acceptance.ratios.tolist())
        for place, (row, tried, chances) in enumerate(tested):
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
            left = acceptance.residual if len(ended) == len(walking) else acceptance.residual[ended]
            _write_rows(distribution, [walking[place] for place in ended], left)
        walking = onward
    return VerifyResult(paths, distribution / distribution.sum(dim=1, keepdim=True), ratios)


def verify_greedy(tree: Tree, logits: torch.Tensor, rule: AcceptanceRule) -> VerifyResult:
    """Accepts every draft that the rule takes for the likeliest token behind an accepted node; the longest path counts.

    With a relaxed rule several siblings may pass; of equally long paths the one with the first leaf wins. Arguments as
    of `verify`.
    """
    batch = len(logits)
    best, accepted = [0] * batch, [(row, 0) for row in range(batch)]
    while accepted := [(row, node) for row, node in accepted if tree.children[row][node]]:
        rows, nodes = zip(*accepted)
        children = [tree.children[row][node] for row, node in accepted]
        passed = rule.is_likeliest(_at(logits, rows, nodes), tree.tokens_at(rows, children)).tolist()
        accepted = [
            (row, child)
            for row, below, marks in zip(rows, children, passed)
            for child, mark in zip(below, marks)
            if mark
        ]
        longest: dict[int, int] = {}
        for row, node in accepted:
            if row not in longest or tree.first_leaves[row][node] < tree.first_leaves[row][longest[row]]:
                longest[row] = node
        for row, node in longest.items():
            best[row] = node
    return VerifyResult([tree.path_to(row, node) for row, node in enumerate(best)])


def _at(values: torch.Tensor, rows: Sequence[int], nodes: Sequence[int]) -> torch.Tensor:
    """values[rows, nodes] of a tensor (B, n, V)."""
    if len(values) == len(rows) == 1:
        return values[:, nodes[0]]
    return values[torch.tensor(rows, device=values.device), torch.tensor(nodes, device=values.device)]


def _write_rows(distribution: torch.Tensor, rows: list[int], values: torch.Tensor) -> None:
    if len(rows) == len(distribution):
        distribution.copy_(values)
    else:
        distribution[torch.tensor(rows, device=distribution.device)] = values
