"""Which tree of drafts pays: what a call of the target costs with n nodes, against the tokens that it should bring.

"Sequoia: Scalable and Robust Speculative Decoding" (arXiv:2402.12374, sections 3.1 and 3.3): child number k of a node
is the accepted one with a probability that depends on k alone. A node is then reached with the product of the
probabilities along its path, the best tree of n nodes holds the n likeliest paths, and the best n is the one that
brings most tokens a second. On a GPU the nodes of a call are nearly free, on a processor each of them costs.
"""

import heapq
from collections.abc import Mapping, Sequence

import torch

from studio.decoding.trees import DynamicTree, StaticTree
from studio.errors import StudioError

_SUPPOSED = (0.4, 0.15, 0.1, 0.07, 0.05)
"""How often child 0, 1, ... of a node is taken to be accepted where nothing was measured."""


def default_tree(device: torch.device, drawn: bool = False) -> DynamicTree | StaticTree:
    """A tree for a drafter where nothing was measured: 6 nodes on a processor; elsewhere the authors' 59, 25 if drawn.

    Args:
        drawn: whether siblings are drawn at random, for which the tree has a fixed shape.
    """
    on_cpu = device.type == "cpu"
    if drawn:
        paths = _likeliest_paths(_SUPPOSED, *(5, 2) if on_cpu else (24, 5))
        return StaticTree(tuple(path for path, _ in paths))
    return DynamicTree(nodes=6, levels=2, width=3) if on_cpu else DynamicTree()


def choose_tree(
    acceptance: Sequence[float],
    verify_seconds: Mapping[int, float],
    *,
    level_seconds: float = 0.0,
    most_levels: int = 8,
) -> StaticTree | None:
    """The tree that brings most tokens a second; None where plain decoding brings more.

    Args:
        acceptance: for k = 0, 1, ..., how often child k of a node is the accepted one; at most 1 together.
        verify_seconds: measured seconds of a call of the target with n nodes, the root included, by n. A call with one
            node is a plain step, and must be there. Numbers between the measured ones are not considered.
        level_seconds: what drafting a level costs, a call of the drafter.
        most_levels: deepest tree that is considered.

    Errors: `StudioError` for probabilities out of range and for times that are missing or not above 0.
    """
    if not acceptance or min(acceptance) < 0 or sum(acceptance) > 1 + 1e-6:
        raise StudioError("acceptance must hold a probability for each child, not below 0, and at most 1 together.")
    if 1 not in verify_seconds or min(verify_seconds.values()) <= 0:
        raise StudioError("verify_seconds must say what calls cost, above 0, that of one node among them.")
    best, most = None, 1 / verify_seconds[1]
    for levels in range(1, most_levels + 1):
        paths = _likeliest_paths(acceptance, max(verify_seconds) - 1, levels)
        for nodes, seconds in verify_seconds.items():
            chosen = paths[: nodes - 1]
            depth = max((len(path) for path, _ in chosen), default=0)
            speed = (1 + sum(probability for _, probability in chosen)) / (seconds + level_seconds * depth)
            if len(chosen) == nodes - 1 and chosen and speed > most:
                best, most = StaticTree(tuple(path for path, _ in chosen)), speed
    return best


def _likeliest_paths(acceptance: Sequence[float], count: int, levels: int) -> list[tuple[tuple[int, ...], float]]:
    """The `count` likeliest paths of at most `levels` ranks, parents and elder siblings first."""
    found, waiting = [], [(-acceptance[0], (0,), 1.0)]
    while waiting and len(found) < count:
        probability, path, above = heapq.heappop(waiting)
        found.append((path, -probability))
        if path[-1] + 1 < len(acceptance):
            heapq.heappush(waiting, (-above * acceptance[path[-1] + 1], (*path[:-1], path[-1] + 1), above))
        if len(path) < levels:
            heapq.heappush(waiting, (probability * acceptance[0], (*path, 0), -probability))
    return found
