"""From draft trees to accepted tokens: walks down from the root along the siblings that pass (`acceptance`).

Target logits of all nodes are there already; only nodes that the walk visits are filtered and weighed. The walk waits
for the device once a level, never for a single draft.
"""

from dataclasses import dataclass, field

import torch

from studio.decoding.acceptance import Relaxation, relaxed_mass, weigh
from studio.decoding.sampling import Sampling
from studio.decoding.trees import Tree


@dataclass
class Verdict:
    """What was accepted in each of B trees.

    `path` (B, d) holds the root's and the accepted nodes' numbers, then -1; `accepted` (B,) counts without the root;
    `law` (B, V) is what the next token comes from, None when greedy: the likeliest behind the last node of the path;
    `tests` holds (trees (R,), which siblings were tried (R, c), ratios (R, c)) for each level of the walk.
    """

    path: torch.Tensor
    accepted: torch.Tensor
    law: torch.Tensor | None = None
    tests: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def ratios(self, row: int) -> list[float]:
        """The ratios of one tree's tests, in the order in which they were made."""
        return [float(x) for rows, made, ratios in self.tests for x in ratios[rows == row][made[rows == row]]]

    @property
    def last(self) -> torch.Tensor:
        """The last accepted node (B,)."""
        return self.path.gather(1, self.accepted[:, None])[:, 0]


def verify(
    tree: Tree,
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    sampling: Sampling,
    relaxation: Relaxation | None = None,
) -> Verdict:
    """Accepts drafts so that tokens follow the target's law, or stay near it (see `acceptance`).

    Args:
        tree: trees of B pictures with n nodes.
        logits: the target's (B, n, V) at every node, guided, before filters.
        uniforms: numbers (B, at least n - 1) from [0, 1), used in order, one for each test.
        sampling: temperature and filters; not greedy.
    """
    batch, _, vocab = logits.shape
    rows = torch.arange(batch, device=logits.device)
    nodes, used = torch.zeros_like(rows), torch.zeros_like(rows)
    accepted, path = torch.zeros_like(rows), [nodes]
    law = logits.new_empty(batch, vocab, dtype=torch.float32)
    tests = []
    while len(rows):
        p = sampling.probabilities(logits[rows, nodes])
        children = tree.children[rows, nodes]
        children = children[:, : int((children >= 0).sum(dim=1).max())]
        if not children.shape[1]:
            law[rows] = p
            break
        tokens = tree.tokens[rows].gather(1, children.clamp(min=0)).masked_fill(children < 0, -1)
        q = None if tree.proposals is None else tree.proposals[rows, tree.proposal_rows[nodes].clamp(min=0)]
        weighed = weigh(p, tokens, q, relaxation)
        place = used[rows, None] + weighed.tried.cumsum(dim=1) - 1
        passed = weighed.tried & (uniforms[rows].gather(1, place.clamp(min=0)) <= weighed.ratios)
        found, first = passed.any(dim=1), passed.int().argmax(dim=1)
        made = weighed.tried & ((passed.cumsum(dim=1) - passed.int()) == 0)
        tests.append((rows, made, weighed.ratios))
        used[rows] += made.sum(dim=1)
        law[rows[~found]] = weighed.rest[~found]
        step = torch.full((batch,), -1, dtype=torch.long, device=logits.device)
        nodes, rows = children.gather(1, first[:, None])[found, 0], rows[found]
        step[rows] = nodes
        accepted[rows] += 1
        path.append(step)
    return Verdict(torch.stack(path, dim=1), accepted, law / law.sum(dim=1, keepdim=True), tests)


def verify_greedy(tree: Tree, logits: torch.Tensor, relaxation: Relaxation | None = None) -> Verdict:
    """Accepts every draft that is the likeliest token behind an accepted node; the longest path counts.

    Relaxed, a draft counts with what it may borrow (each on its own), and its neighbours keep what they have, so
    several siblings may pass; of equally long paths the one with the first leaf wins. Arguments as of `verify`.
    """
    batch, n, _ = logits.shape
    rows = torch.arange(batch, device=logits.device)
    nodes = torch.zeros_like(rows)
    best, length = torch.zeros_like(rows), torch.zeros_like(rows)
    first_leaf = None if relaxation is None else _first_leaf(tree)
    while len(rows):
        children = tree.children[rows, nodes]
        tokens = tree.tokens[rows].gather(1, children.clamp(min=0))
        passed = _is_likeliest(logits[rows, nodes], tokens, relaxation) & (children >= 0)
        parents, ranks = torch.nonzero(passed, as_tuple=True)
        nodes, rows = children[parents, ranks], rows[parents]
        if relaxation is None:
            best[rows] = nodes
        else:
            ends = torch.full((batch,), n, dtype=torch.long, device=logits.device)
            ends.scatter_reduce_(0, rows, first_leaf[rows, nodes], "amin")
            chosen = first_leaf[rows, nodes] == ends[rows]
            best[rows[chosen]] = nodes[chosen]
        length[rows] = tree.depths[rows, nodes]
    above = tree.ancestors[torch.arange(batch, device=logits.device), best]
    order = torch.where(above, torch.arange(n, device=logits.device), n).sort(dim=1).values
    path = order[:, : int(length.max()) + 1]
    return Verdict(path.masked_fill(path == n, -1), length)


def _is_likeliest(logits: torch.Tensor, tokens: torch.Tensor, relaxation: Relaxation | None) -> torch.Tensor:
    """Which tokens (R, c) would be drawn behind R nodes if they held what they may borrow."""
    if relaxation is None:
        return tokens == logits.argmax(dim=-1)[:, None]
    p = logits.float().softmax(dim=-1)
    top, places = p.topk(2, dim=-1)
    others = torch.where(tokens == places[:, :1], top[:, 1:], top[:, :1])
    flat = p.repeat_interleave(tokens.shape[1], dim=0)
    held = relaxed_mass(flat, tokens.flatten(), relaxation).view_as(others)
    return (held > others) | (tokens == logits.argmax(dim=-1)[:, None])


def _first_leaf(tree: Tree) -> torch.Tensor:
    """Number (B, n) of the first leaf at or below each node."""
    n = tree.parents.shape[1]
    leaves = (tree.children < 0).all(dim=2)
    places = torch.where(tree.ancestors & leaves[:, :, None], torch.arange(n, device=leaves.device)[:, None], n)
    return places.amin(dim=1)
