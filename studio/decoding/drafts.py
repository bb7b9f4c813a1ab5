"""Drafts for speculative decoding: the interface of what makes them, and two ways that need no training.

Drafts are chosen by a frozen object of settings (`Drafts`), whose `candidate_generator` holds the state of one call.
An image's drafts may depend on its own tokens, states and random numbers only, so results do not depend on batch size,
and never on the uniform numbers of the tests.

`NGram`: what followed the last time that the latest tokens stood in the image. Prompt lookup ("Inference with
Reference", arXiv:2304.04487), with several continuations as branches of a tree.

`TokenRecycling`: the candidates that the target itself had when a token stood in the image before ("Turning Trash into
Treasure", arXiv:2408.08696). A table keeps, for each token, the likeliest tokens behind it when the target saw it last,
in the image or in a draft; a tree of fixed shape is filled from that table. Deviations from the authors' code: every
image begins with an empty table of its own; drafts that have no entry are left out; drafts can be sampled from the
probabilities that the candidates had then, as LANTERN++ wants them, and not only be the likeliest.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from studio.checks import check_integer, set_fields
from studio.decoding.autoregressive import Guidance
from studio.decoding.sampling import Sampling, exponential_noise
from studio.decoding.trees import MAX_NODES, StaticTree, Tree, trees_of
from studio.errors import StudioError


@dataclass
class DraftContext:
    """What a call is about: the target, valid prefix positions (rows, T) or None, and how its tokens are sampled.

    `guidance` follows the loop: its number of streams drops when the unconditional rows leave. `drafter` is the
    `Drafter` that belongs to the target, if any; `weights` says how the target is run, as of `Autoregressive`;
    `region_conditioning` is the target's for these rows, as of `LlamaGen.region_conditioning`.
    """

    model: Any
    valid: torch.Tensor | None
    batch: int
    sampling: Sampling
    guidance: Guidance
    drafter: Any = None
    weights: str = "plain"
    region_conditioning: torch.Tensor | None = None


@dataclass
class Progress:
    """How far B images are before a call of the target.

    Args:
        tokens: (B, N) int64, of which the first `lengths` (B,) are sampled; the last of those is the root.
        max_depth: levels (B,) that a tree may have; more cannot be of use.
        generators: one per image.
        states: the target's states (rows, T + N, dim) of all positions before the root; None unless `uses_states`.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    max_depth: torch.Tensor
    generators: list[torch.Generator]
    states: torch.Tensor | None

    @property
    def roots(self) -> torch.Tensor:
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]


class CandidateGenerator(Protocol):
    """Makes drafts during one call of a pipeline; the names are those of `transformers.CandidateGenerator`.

    `nodes` bounds the nodes of its trees with the root; `uses_states` says whether it reads the target's states.
    """

    nodes: int
    uses_states: bool

    def get_candidates(self, progress: Progress) -> Tree:
        """Trees below the roots, siblings distinct, at most `max_depth` levels."""

    def update_candidate_strategy(self, tree: Tree, logits: torch.Tensor) -> None:
        """Sees the target's guided logits (B, n, V) at the nodes of its trees."""

    def rewind(self, lengths: list[int]) -> None:
        """Some images go back to their first `lengths` tokens, of which the last one has changed."""

    def select(self, images: list[int], rows: list[int]) -> None:
        """Goes on with these images, and these rows of the batch, only."""

    def settle(self, progress: Progress) -> None:
        """Does what new images need before they go on in another batch."""

    def absorb(self, other: Any, count: int, order: list[int]) -> None:
        """Goes on with the images of another generator with equal settings behind its own `count` images.

        The rows of both, those of the other behind, stand in this order.
        """


class Drafts(Protocol):
    """Settings that make drafts.

    `sampled` says whether it samples siblings at random, from distributions that its trees carry, where the target is
    not greedy.
    """

    @property
    def sampled(self) -> bool: ...

    def candidate_generator(self, context: DraftContext) -> CandidateGenerator:
        """Fresh state for a call.

        Raises:
            StudioError: when the drafts do not fit the target.
        """


class StatelessCandidates:
    """A `CandidateGenerator` without states of the target; subclasses add `nodes` and `get_candidates`."""

    uses_states = False

    def update_candidate_strategy(self, tree: Tree, logits: torch.Tensor) -> None:
        pass

    def rewind(self, lengths: list[int]) -> None:
        pass

    def select(self, images: list[int], rows: list[int]) -> None:
        pass

    def settle(self, progress: Progress) -> None:
        pass

    def absorb(self, other: Any, count: int, order: list[int]) -> None:
        pass


@dataclass(frozen=True)
class NGram:
    """Settings.

    Args:
        longest: most tokens that are compared; fewer, down to 1, where so many never stood together before.
        branches: most continuations, the latest first.
        levels: tokens of a continuation.

    Raises:
        StudioError: for numbers below 1.
    """

    longest: int = 3
    branches: int = 2
    levels: int = 3

    sampled = False

    def __post_init__(self) -> None:
        for name in ("longest", "branches", "levels"):
            set_fields(self, **{name: check_integer(f"{name} of n-gram drafts", getattr(self, name), 1, MAX_NODES)})
        nodes = self.branches * self.levels
        if nodes > MAX_NODES:
            raise StudioError(f"n-gram drafts have at most {MAX_NODES} nodes, not {nodes}: lower branches or levels.")

    def candidate_generator(self, context: DraftContext) -> "_NGramCandidates":
        return _NGramCandidates(self)


class _NGramCandidates(StatelessCandidates):
    def __init__(self, settings: NGram) -> None:
        self.settings, self.nodes = settings, 1 + settings.branches * settings.levels

    def get_candidates(self, progress: Progress) -> Tree:
        lengths, max_depths = progress.lengths.tolist(), progress.max_depth.tolist()
        rows = [
            _tree(tokens[:length], continuations(tokens[:length], self.settings, min(max_depth, self.settings.levels)))
            for tokens, length, max_depth in zip(progress.tokens.tolist(), lengths, max_depths)
        ]
        return trees_of(rows, progress.tokens.device)


def continuations(tokens: list[int], settings: NGram, levels: int) -> list[list[int]]:
    """At most `branches` lists of at most `levels` tokens, those after the longest repeats first, then the latest."""
    found: list[list[int]] = []
    for length in range(min(settings.longest, len(tokens) - 1), 0, -1):
        latest = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if levels and tokens[end - length : end] == latest:
                following = tokens[end : end + levels]
                if following not in found:
                    found.append(following)
                if len(found) == settings.branches:
                    return found
    return found


def _tree(tokens: list[int], paths: list[list[int]]) -> tuple[list[int], list[int]]:
    """Tokens and parents of the tree of all paths below the last token, in level order."""
    nodes = sorted({tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}, key=lambda p: _order(p, paths))
    number = {(): 0, **{node: place + 1 for place, node in enumerate(nodes)}}
    return [tokens[-1], *(node[-1] for node in nodes)], [-1, *(number[node[:-1]] for node in nodes)]


def _order(node: tuple[int, ...], paths: list[list[int]]) -> tuple[int, int]:
    """Level by level, and within a level as the paths come."""
    return len(node), next(place for place, path in enumerate(paths) if tuple(path[: len(node)]) == node)


@dataclass(frozen=True)
class TokenRecycling:
    """Settings.

    Args:
        tree: the shape of the trees; the default is for a CPU, where every node costs.
        sampled: whether siblings are sampled without replacement from the candidates' probabilities; else, and when the
            target is greedy, they are the likeliest.
        candidates: how many the table keeps for a token that drafts are sampled for, at least the width of the tree.

    Raises:
        StudioError: for a number of candidates below 1.
    """

    tree: StaticTree = StaticTree(((0,), (1,), (0, 0), (0, 0, 0)))
    sampled: bool = False
    candidates: int = 8

    def __post_init__(self) -> None:
        set_fields(self, candidates=check_integer("candidates of recycled drafts", self.candidates, 1, MAX_NODES))

    def candidate_generator(self, context: DraftContext) -> CandidateGenerator:
        if self.sampled and not context.sampling.greedy:
            return _RecycledSamples(self.tree, max(self.candidates, self.tree.width), context)
        return _Recycled(self.tree, context)


class _Recycled(StatelessCandidates):
    """For each image the likeliest tokens behind each token that was seen, and trees filled in their order."""

    def __init__(self, shape: StaticTree, context: DraftContext) -> None:
        self.shape, self.nodes = shape, shape.nodes
        self.likeliest: list[dict[int, list[int]]] = [{} for _ in range(context.batch)]

    def get_candidates(self, progress: Progress) -> Tree:
        rows = zip(self.likeliest, progress.roots.tolist(), progress.max_depth.tolist())
        return trees_of([self._filled(*row) for row in rows], progress.tokens.device)

    def _filled(self, likeliest: dict[int, list[int]], root: int, max_depth: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one tree; drafts without an entry are left out."""
        shape, tokens, parents, number = self.shape, [root], [-1], {0: 0}
        for node in range(1, shape.nodes):
            above, rank = number.get(shape.parents[node]), shape.ranks[node]
            if above is None or shape.depths[node] > max_depth:
                continue
            candidates = likeliest.get(tokens[above], ())
            if rank < len(candidates):
                number[node] = len(tokens)
                tokens.append(candidates[rank])
                parents.append(above)
        return tokens, parents

    def update_candidate_strategy(self, tree: Tree, logits: torch.Tensor) -> None:
        best = logits.topk(min(self.shape.width, logits.shape[-1]), dim=-1).indices.tolist()
        for likeliest, tokens, parents, seen in zip(self.likeliest, tree.token_lists, tree.parents.tolist(), best):
            likeliest.update(
                (tokens[node], seen[node]) for node in range(len(tokens)) if node == 0 or parents[node] >= 0
            )

    def select(self, images: list[int], rows: list[int]) -> None:
        self.likeliest = [self.likeliest[image] for image in images]

    def absorb(self, other: Any, count: int, order: list[int]) -> None:
        self.likeliest = self.likeliest + other.likeliest


class _RecycledSamples(StatelessCandidates):
    """Candidates (B, V, kept), -1 where there is none, their probabilities after filters, and trees sampled of them."""

    def __init__(self, shape: StaticTree, kept: int, context: DraftContext) -> None:
        self.shape, self.kept, self.nodes, self.sampling = shape, kept, shape.nodes, context.sampling
        size, device = (context.batch, context.model.config.vocab_size, kept), context.model.device
        self.candidates = torch.full(size, -1, dtype=torch.int32, device=device)
        self.masses = torch.zeros(size, device=device)

    def get_candidates(self, progress: Progress) -> Tree:
        roots, shape = progress.roots, self.shape
        (batch, vocab, kept), count = self.candidates.shape, len(shape.expanded)
        rows = torch.arange(batch, device=roots.device)
        races = [exponential_noise(count, kept, [one] * count, roots.device) for one in progress.generators]
        tokens = torch.full((batch, shape.nodes), -1, device=roots.device)
        tokens[:, 0] = roots
        distributions = torch.zeros(batch, count, vocab, device=roots.device)
        proposal_rows = torch.full((shape.nodes,), -1, device=roots.device)
        for place, (node, race) in enumerate(zip(shape.expanded, torch.stack(races, dim=1))):
            above = tokens[:, node].clamp(min=0)
            codes = self.candidates[rows, above].clamp(min=0).long()
            masses = self.masses[rows, above] * (tokens[:, node, None] >= 0)
            distributions[:, place].scatter_add_(1, codes, masses)
            proposal_rows[node] = place
            children = [child for child, parent in enumerate(shape.parents) if parent == node]
            won = (masses / race).topk(len(children), dim=1)
            exists = (won.values > 0) & (progress.max_depth[:, None] > shape.depths[node])
            tokens[:, children] = torch.where(exists, codes.gather(1, won.indices), -1)
        parents = torch.tensor(shape.parents, device=tokens.device).expand_as(tokens)
        exists = tokens >= 0
        size = 1 + int(torch.nonzero(exists.any(dim=0))[-1])
        parents = parents.masked_fill(~exists, -1)[:, :size]
        return Tree(tokens.clamp(min=0)[:, :size], parents, distributions, proposal_rows)

    def update_candidate_strategy(self, tree: Tree, logits: torch.Tensor) -> None:
        distributions = self.sampling.probabilities(logits.flatten(0, 1)).view_as(logits)
        best = distributions.topk(min(self.kept, distributions.shape[-1]), dim=-1)
        self._remember(tree, self.candidates, best.indices.int())
        self._remember(tree, self.masses, best.values)

    def _remember(self, tree: Tree, table: torch.Tensor, seen: torch.Tensor) -> None:
        """Writes what was seen (B, n, w) at the nodes into a table (B, V, kept), later nodes over earlier ones."""
        exists = tree.parents >= 0
        exists[:, 0] = True
        rows, width = torch.arange(len(seen), device=seen.device), seen.shape[2]
        for node in range(seen.shape[1]):
            token = tree.tokens[:, node]
            known = table[rows, token, :width]
            table[rows, token, :width] = torch.where(exists[:, node, None], seen[:, node], known)

    def select(self, images: list[int], rows: list[int]) -> None:
        self.candidates, self.masses = self.candidates[images], self.masses[images]

    def absorb(self, other: Any, count: int, order: list[int]) -> None:
        self.candidates = torch.cat((self.candidates, other.candidates))
        self.masses = torch.cat((self.masses, other.masses))
