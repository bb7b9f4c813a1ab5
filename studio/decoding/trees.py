"""Draft trees: which drafted token follows which, and the two shapes that a drafter fills.

Node 0 is the root, a token that is sampled already and that the target has not read. Every other node proposes the
token behind its parent. Nodes stand in level order, siblings in the order in which they are tried.

Trees of fixed shape by default follow "Sequoia: Scalable and Robust Speculative Decoding" (arXiv:2402.12374, section
3.1): child number k of a node is the accepted one with a probability that depends on k alone. A node is then reached
with the product of the probabilities along its path, and the best tree of n nodes holds the n likeliest paths. On a GPU
the nodes of a call are nearly free, on a CPU each of them costs.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from studio import backends
from studio.checks import check_integer, set_fields, shown
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen

MAX_NODES = 4096


@dataclass
class Tree:
    """Trees of B images, filled up to one size n.

    Args:
        tokens: (B, n) int64; 0 where there is no node.
        parents: (B, n) int64, smaller than the node's own number; -1 at the root and where there is no node.
        proposals: distributions (B, e, V) that children were sampled from without replacement; None for deterministic
            drafts.
        proposal_rows: (n,) which of the e distributions belongs to a node's children; -1 for a leaf.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    proposals: torch.Tensor | None = None
    proposal_rows: torch.Tensor | None = None

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """(B, n, n) bool: whether node j is node i or above it."""
        return self._stacked("ancestors")

    @cached_property
    def depths(self) -> torch.Tensor:
        """(B, n) int64: steps from the root; 0 where there is no node."""
        return self._stacked("depths")

    @cached_property
    def children(self) -> list[list[list[int]]]:
        """Numbers of each node's children, in order, for each image."""
        return [shape.children for shape in self._shapes]

    @cached_property
    def first_leaves(self) -> list[list[int]]:
        """Number of the first leaf at or below each node, for each image."""
        return [shape.first_leaves for shape in self._shapes]

    @cached_property
    def token_lists(self) -> list[list[int]]:
        """The tokens of each image."""
        return self.tokens.tolist()

    def tokens_at(self, images: Sequence[int], nodes: list[list[int]]) -> torch.Tensor:
        """Tokens (R, c) of some nodes of R images, in order, then -1."""
        width = max(map(len, nodes))
        rows = [
            [self.token_lists[image][node] for node in some] + [-1] * (width - len(some))
            for image, some in zip(images, nodes)
        ]
        return torch.tensor(rows, device=self.tokens.device)

    def path_to(self, image: int, node: int) -> list[int]:
        """Numbers of the nodes from the root to a node."""
        return torch.nonzero(self._shapes[image].ancestors[node])[:, 0].tolist()

    @cached_property
    def _shapes(self) -> list["_Shape"]:
        return [_shape_of(tuple(parents)) for parents in self.parents.tolist()]

    def _stacked(self, name: str) -> torch.Tensor:
        return torch.stack([getattr(shape, name) for shape in self._shapes]).to(self.parents.device)


@dataclass(frozen=True)
class _Shape:
    """What follows from the parents of one tree."""

    ancestors: torch.Tensor
    depths: torch.Tensor
    children: list[list[int]]
    first_leaves: list[int]


@lru_cache(maxsize=4096)
def _shape_of(parents: tuple[int, ...]) -> _Shape:
    """Kept, as small trees come again and again."""
    lines: list[list[int]] = []
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        lines.append([*lines[parent], node] if parent >= 0 else [node])
        if parent >= 0:
            children[parent].append(node)
    ancestors = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, line in enumerate(lines):
        ancestors[node, line] = True
    first = list(range(len(parents)))
    for node in reversed(first):
        first[node] = min((first[child] for child in children[node]), default=node)
    return _Shape(ancestors, torch.tensor([len(line) - 1 for line in lines]), children, first)


def trees_of(rows: list[tuple[list[int], list[int]]], device: torch.device | str) -> Tree:
    """Trees from lists (tokens, parents) of each image, the root included."""
    n = max(len(tokens) for tokens, _ in rows)
    tokens = [one + [0] * (n - len(one)) for one, _ in rows]
    parents = [one + [-1] * (n - len(one)) for _, one in rows]
    return Tree(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))


@dataclass(frozen=True)
class StaticTree:
    """A tree of one shape: paths of ranks, `(0, 1)` being the second child of the first child of the root.

    Args:
        paths: the nodes without the root, in any order; a node's parent and its elder siblings must be there too.

    Raises:
        StudioError: for paths that are no tree.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Sequence) or not all(isinstance(path, Sequence) for path in self.paths):
            raise StudioError(f"paths are tuples of ranks such as ((0,), (0, 0)), not {shown(self.paths)}.")
        check_integer("The number of nodes of a draft tree", len(self.paths) + 1, 1, MAX_NODES)
        ranks = [[check_integer("A rank in a draft tree", rank, 0, MAX_NODES) for rank in path] for path in self.paths]
        paths = tuple(sorted(map(tuple, ranks), key=lambda path: (len(path), path)))
        set_fields(self, paths=paths)
        known: set[tuple[int, ...]] = {()}
        for path in paths:
            elder = (*path[:-1], path[-1] - 1) if path and path[-1] else ()
            if not path or path in known or path[:-1] not in known or elder not in known:
                raise StudioError(f"{path} has no place in the tree: each path needs its parent and elder siblings.")
            known.add(path)
        if not paths:
            raise StudioError("A draft tree needs at least one path, for example (0,).")

    @property
    def nodes(self) -> int:
        """Nodes with the root."""
        return len(self.paths) + 1

    @property
    def levels(self) -> int:
        return len(self.paths[-1])

    @property
    def width(self) -> int:
        """Most children of a node."""
        return max(path[-1] for path in self.paths) + 1

    @cached_property
    def parents(self) -> list[int]:
        """Number of each node's parent, -1 for the root."""
        number = {(): 0, **{path: place + 1 for place, path in enumerate(self.paths)}}
        return [-1, *(number[path[:-1]] for path in self.paths)]

    @cached_property
    def ranks(self) -> list[int]:
        """Place of each node among its siblings; 0 for the root."""
        return [0, *(path[-1] for path in self.paths)]

    @cached_property
    def depths(self) -> list[int]:
        """Level of each node; 0 for the root."""
        return [0, *(len(path) for path in self.paths)]

    @cached_property
    def expanded(self) -> list[int]:
        """Nodes with children, in level order."""
        return sorted(set(self.parents[1:]))


@dataclass(frozen=True)
class DynamicTree:
    """A tree that grows where the drafter is sure (EAGLE-2, arXiv:2406.16858, section 4).

    Args:
        nodes: most nodes, with the root (the authors' 59).
        levels: most levels below the root; each but the first costs a call of the drafter (the authors' depth 4 makes
            5).
        width: children that a node may get, and nodes of a level that get any (the authors' 10).

    Raises:
        StudioError: for numbers below 1, and for fewer than two nodes.
    """

    nodes: int = 59
    levels: int = 5
    width: int = 10

    def __post_init__(self) -> None:
        for name, least in (("nodes", 2), ("levels", 1), ("width", 1)):
            set_fields(self, **{name: check_integer(f"{name} of a draft tree", getattr(self, name), least, MAX_NODES)})


def grow(
    shape: DynamicTree,
    roots: torch.Tensor,
    first: torch.Tensor,
    expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    max_depth: torch.Tensor,
) -> Tree:
    """Grows trees below the roots (B,).

    Args:
        first: the drafter's log-probabilities (B, V) behind the roots.
        expand: called once a level as (tokens (B, w), which of the w nodes of the level before is the parent (B, w)),
            returns log-probabilities (B, w, V) behind each.
        max_depth: levels (B,) that an image has left.

    A node's score is its path's log-probability; the best `nodes` - 1 of all scores stay. Deviation from the authors'
    code: among equal scores (a log-probability that rounds to 0) the elder level comes first, so that no node stays
    without its parent; nodes of no probability are left out.
    """
    batch, width = len(roots), min(shape.width, first.shape[-1])
    deepest = min(shape.levels, int(max_depth.max()))
    if deepest < 1:
        return Tree(roots[:, None], torch.full_like(roots[:, None], -1))
    scores, tokens = first.topk(width, dim=-1)
    scores = scores.masked_fill(max_depth[:, None] < 1, float("-inf"))
    parents = torch.full_like(tokens, -1)
    pool = [(scores, tokens, parents)]
    beam, beam_scores, beam_tokens = torch.arange(width, device=roots.device).repeat(batch, 1), scores, tokens
    came_from, size = torch.zeros_like(tokens), width
    for level in range(2, deepest + 1):
        below, new = expand(beam_tokens, came_from).topk(width, dim=-1)
        scores = (beam_scores[:, :, None] + below).flatten(1).masked_fill(max_depth[:, None] < level, float("-inf"))
        new = new.flatten(1)
        pool.append((scores, new, beam.repeat_interleave(width, dim=1)))
        beam_scores, best = scores.topk(width, dim=-1)
        came_from, beam_tokens, beam = best // width, new.gather(1, best), size + best
        size += width * width
    scores, tokens, parents = (torch.cat(parts, dim=1) for parts in zip(*pool))
    return _best(shape.nodes - 1, roots, scores, tokens, parents)


def _best(count: int, roots, scores, tokens, parents) -> Tree:
    """The tree of the `count` best of a pool (B, size); `parents` are places in the pool, -1 for the root."""
    count = min(count, scores.shape[1])
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    exists = scores.gather(1, order) > float("-inf")
    order = order.gather(1, exists.int().sort(dim=1, descending=True, stable=True).indices)
    exists = scores.gather(1, order) > float("-inf")
    number = torch.zeros_like(scores, dtype=torch.long)
    number.scatter_(1, order, torch.arange(1, count + 1, device=roots.device).expand_as(order).contiguous())
    above = parents.gather(1, order)
    above = torch.where(above < 0, 0, number.gather(1, above.clamp(min=0)))
    start = torch.full_like(roots[:, None], -1)
    return Tree(
        torch.cat((roots[:, None], tokens.gather(1, order) * exists), dim=1),
        torch.cat((start, above.masked_fill(~exists, -1)), dim=1),
    )


SUPPOSED_ACCEPTANCE = (0.4, 0.15, 0.1, 0.07, 0.05)
"""How often child 0, 1, ... of a node is taken to be accepted where nothing was measured."""


def default_tree(device: torch.device, sampled: bool = False) -> DynamicTree | StaticTree:
    """A tree for a drafter where nothing was measured: 6 nodes on a processor; elsewhere the authors' 59, 25 if
    sampled.

    Args:
        sampled: whether siblings are sampled at random, for which the tree has a fixed shape.
    """
    on_cpu = device.type == "cpu"
    if sampled:
        paths = _likeliest_paths(SUPPOSED_ACCEPTANCE, *(5, 2) if on_cpu else (24, 5))
        return StaticTree(tuple(path for path, _ in paths))
    return DynamicTree(nodes=6, levels=2, width=3) if on_cpu else DynamicTree()


def _likeliest_paths(acceptance: Sequence[float], count: int, levels: int) -> list[tuple[tuple[int, ...], float]]:
    """The `count` likeliest paths of at most `levels` ranks, parents and elder siblings first."""
    found: list[tuple[tuple[int, ...], float]] = []
    waiting: list[tuple[float, tuple[int, ...], float]] = [(-acceptance[0], (0,), 1.0)]
    while waiting and len(found) < count:
        probability, path, above = heapq.heappop(waiting)
        found.append((path, -probability))
        if path[-1] + 1 < len(acceptance):
            heapq.heappush(waiting, (-above * acceptance[path[-1] + 1], (*path[:-1], path[-1] + 1), above))
        if len(path) < levels:
            heapq.heappush(waiting, (probability * acceptance[0], (*path, 0), -probability))
    return found


def path_call(model: LlamaGen, rows: int, nodes: int, weights: str = "auto") -> Callable[[], None]:
    """A call for a path of `nodes` tokens in each of some sequences, half generated; it leaves the cache as it was.

    Args:
        rows: sequences, unconditional ones included.
        weights: how the model is run, as of `Autoregressive`.
    """
    view = backends.select(model, weights)
    last = len(model.rope()) - 1
    length = last + 1 - model.num_tokens // 2
    cache = view.new_tree_cache(rows, nodes)
    cache.advance(length)
    cache.keep_all()
    tree = trees_of([([0] * nodes, list(range(-1, nodes - 1)))] * rows, model.device)
    positions = (length + tree.depths).clamp(max=last)

    @torch.no_grad()
    def call() -> None:
        view.logits(view.extend_tree(tree.tokens, cache, positions, tree.ancestors))
        cache.forget()

    return call
