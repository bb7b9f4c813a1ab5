"""Drafts of a trained `Drafter`: a tree of fixed shape, or one that grows where the drafter is sure.

EAGLE (arXiv:2401.15077), EAGLE-2 (arXiv:2406.16858), LANTERN (arXiv:2410.03355) and LANTERN++ (arXiv:2502.06352). The
drafter sees the target's own states up to the root; below it, its guesses stand for them. Both guidance streams are
drafted, with the target's scale. When sampling at random, children in a tree of fixed shape are sampled without
replacement, from the distribution that filters leave; otherwise they are the likeliest.

Deviations from the authors' code: trees end with the image; as many children are sampled as the shape has, not always
ten; what is kept in the drafter's cache comes from the target's states alone, fed once.

`AutoDrafts` takes the drafter that belongs to a model, or, where it has none, recycles tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from studio import backends
from studio.decoding.drafts import CandidateGenerator, DraftContext, Progress, TokenRecycling
from studio.decoding.sampling import exponential_noise
from studio.decoding.trees import DynamicTree, StaticTree, Tree, default_tree, grow
from studio.errors import StudioError


@dataclass(frozen=True)
class DrafterDrafts:
    """Settings.

    Args:
        drafter: a `Drafter` of the target's sizes, in evaluation mode.
        tree: `DynamicTree` or `StaticTree`.

    Raises:
        StudioError: for another tree.
    """

    drafter: Any
    tree: DynamicTree | StaticTree = DynamicTree()

    def __post_init__(self) -> None:
        if not isinstance(self.tree, (DynamicTree, StaticTree)):
            raise StudioError(f"tree is a DynamicTree or a StaticTree, not {type(self.tree).__name__}.")

    @property
    def sampled(self) -> bool:
        return isinstance(self.tree, StaticTree)

    def candidate_generator(self, context: DraftContext) -> "DrafterCandidates":
        self.drafter.check_target(context.model)
        return DrafterCandidates(self.drafter, self.tree, context)


class DrafterCandidates:
    """The drafter's cache during one call; row i of it belongs to row i of the target."""

    uses_states = True

    def __init__(self, drafter: Any, shape: DynamicTree | StaticTree, context: DraftContext) -> None:
        self.nodes = shape.nodes
        self.drafter, self.shape, self.context = backends.select_drafter(drafter, context.weights), shape, context
        self.before = context.model.prefix_length - 1
        self.guidance = context.guidance
        pending = shape.levels * shape.width if isinstance(shape, DynamicTree) else len(shape.expanded)
        rows = context.batch * self.guidance.streams
        self.cache = self.drafter.new_tree_cache(rows, max(pending, shape.levels) + 2)
        self.cache.region_conditioning = drafter.region_conditioning(context.region_conditioning)
        if context.valid is not None:
            self.cache.mask_prefix(context.valid)

    def get_candidates(self, progress: Progress) -> Tree:
        root_states = self._catch_up(progress)
        fill = self._static if isinstance(self.shape, StaticTree) else self._dynamic
        tree = fill(progress, root_states)
        self.cache.forget()
        return tree

    def update_candidate_strategy(self, tree: Tree, logits: torch.Tensor) -> None:
        pass

    def rewind(self, lengths: list[int]) -> None:
        self.cache.crop_rows([self.before + length - 1 for length in lengths] * self.guidance.streams)

    def select(self, images: list[int], rows: list[int]) -> None:
        self.cache.select_rows(rows)

    def settle(self, progress: Progress) -> None:
        """Feeds the states of the prefix, which is longer than what others are behind by."""
        if self.before:
            self._catch_up(progress, 1)

    def absorb(self, other: Any, count: int, order: list[int]) -> None:
        self.cache.absorb_rows(other.cache, order)

    def _catch_up(self, progress: Progress, short: int = 0) -> torch.Tensor:
        """Feeds the target's states up to the root, or so many short of it; the guesses (rows, 1, dim) behind."""
        batch = len(progress.lengths)
        starts = self.cache.lengths[:batch]
        ends = [self.before + length - short for length in progress.lengths.tolist()]
        counts = [end - start for start, end in zip(starts, ends)]
        new = range(max(counts))
        each = [[min(start + step, end - 1) for step in new] for start, end in zip(starts, ends)]
        positions = torch.tensor(each, device=progress.tokens.device)
        rows = self.guidance.rows(positions)
        assert progress.states is not None
        states = progress.states.gather(1, rows[:, :, None].expand(-1, -1, progress.states.shape[2]))
        visible = torch.ones(len(new), len(new), dtype=torch.bool, device=rows.device).tril().expand(len(rows), -1, -1)
        tokens = progress.tokens.gather(1, (positions - self.before).clamp(min=0))
        tokens = self.guidance.rows(tokens.masked_fill(positions < self.before, 0))
        out = self.drafter.extend_tree(tokens, states, self.cache, rows, visible)
        self.cache.keep([range(count) for count in counts] * self.guidance.streams)
        last = [max(count - 1, 0) for count in counts] * self.guidance.streams
        return out[list(range(len(rows))), last][:, None]

    def _logits(self, states: torch.Tensor, progress: Progress, depth: int) -> torch.Tensor:
        """Guided logits (B, n, V) behind nodes of one depth, from guesses (rows, n, dim) at their states."""
        index = (progress.lengths + depth)[:, None].expand(-1, states.shape[1])
        return self.guidance.combine(self.context.model.logits(states), index)

    def _distributions(self, logits: torch.Tensor) -> torch.Tensor:
        if self.context.sampling.greedy:
            return logits.softmax(dim=-1)
        return self.context.sampling.probabilities(logits.flatten(0, 1)).view_as(logits)

    def _log_distributions(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(dim=-1) if self.context.sampling.greedy else self._distributions(logits).log()

    def _feed(self, tokens, states, progress: Progress, depth: int, visible) -> torch.Tensor:
        """Guesses (rows, n, dim) behind nodes (B, n) of one depth, given those behind their parents."""
        positions = (self.before + progress.lengths - 1 + depth)[:, None].expand_as(tokens)
        rows = self.guidance.rows
        return self.drafter.extend_tree(rows(tokens), states, self.cache, rows(positions), rows(visible))

    def _dynamic(self, progress: Progress, root_states: torch.Tensor) -> Tree:
        seen = torch.zeros(len(progress.lengths), 1, 0, dtype=torch.bool, device=root_states.device)
        level: dict[str, Any] = {"states": root_states, "seen": seen, "depth": 0}

        def expand(tokens: torch.Tensor, came_from: torch.Tensor) -> torch.Tensor:
            level["depth"] += 1
            width = tokens.shape[1]
            above = level["seen"].gather(1, came_from[:, :, None].expand(-1, -1, level["seen"].shape[2]))
            own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
            level["seen"] = torch.cat((above, own), dim=2)
            parents = self.guidance.rows(came_from)[:, :, None].expand(-1, -1, root_states.shape[2])
            states = level["states"].gather(1, parents)
            level["states"] = self._feed(tokens, states, progress, level["depth"], level["seen"])
            return self._log_distributions(self._logits(level["states"], progress, level["depth"]))

        first = self._log_distributions(self._logits(root_states, progress, 0))[:, 0]
        assert isinstance(self.shape, DynamicTree)
        return grow(self.shape, progress.roots, first, expand, progress.max_depth)

    def _static(self, progress: Progress, root_states: torch.Tensor) -> Tree:
        assert isinstance(self.shape, StaticTree)
        shape, device, batch = self.shape, root_states.device, len(progress.lengths)
        tokens = torch.zeros(batch, shape.nodes, dtype=torch.long, device=device)
        tokens[:, 0] = progress.roots
        proposal_rows = torch.full((shape.nodes,), -1, dtype=torch.long, device=device)
        states, behind = root_states, {0: 0}
        distributions: list[torch.Tensor] = []
        fed: list[int] = []
        for depth in range(min(shape.levels, int(progress.max_depth.max()))):
            nodes = [node for node in shape.expanded if shape.depths[node] == depth]
            if depth:
                places = torch.tensor([behind[shape.parents[node]] for node in nodes], device=device)
                visible = self._ancestors(nodes, fed + nodes).to(device).expand(batch, -1, -1)
                states = self._feed(tokens[:, nodes], states[:, places], progress, depth, visible)
                fed += nodes
            behind = {node: place for place, node in enumerate(nodes)}
            proposal_rows[nodes] = len(distributions) + torch.arange(len(nodes), device=device)
            distribution = self._distributions(self._logits(states, progress, depth))
            distributions += distribution.unbind(1)
            ranked = self._ranked(distribution, progress, depth)
            for child, parent in enumerate(shape.parents):
                if parent in behind:
                    tokens[:, child] = ranked[:, behind[parent], shape.ranks[child]]
        parents = torch.tensor(shape.parents, device=device).expand_as(tokens)
        exists = torch.tensor(shape.depths, device=device) <= progress.max_depth[:, None]
        parents = parents.masked_fill(~exists, -1)
        if self.context.sampling.greedy or not distributions:
            return Tree(tokens, parents)
        return Tree(tokens, parents, torch.stack(distributions, dim=1), proposal_rows)

    def _ranked(self, distribution: torch.Tensor, progress: Progress, depth: int) -> torch.Tensor:
        """Children (B, n, width) of n nodes: the likeliest, or sampled without replacement from distributions (B, n,
        V).
        """
        if self.context.sampling.greedy:
            return distribution.topk(self.shape.width, dim=-1).indices
        nodes, vocab = distribution.shape[1:]
        noise = torch.ones_like(distribution)
        for row, (max_depth, generator) in enumerate(zip(progress.max_depth.tolist(), progress.generators)):
            if depth < max_depth:
                noise[row] = exponential_noise(nodes, vocab, [generator] * nodes, distribution.device)
        return (distribution / noise).topk(self.shape.width, dim=-1).indices

    def _ancestors(self, nodes: list[int], pending: list[int]) -> torch.Tensor:
        """Which of the pending nodes are above each of some nodes, or that node: (n, pending) bool."""
        assert isinstance(self.shape, StaticTree)
        above = []
        for node in nodes:
            line = set()
            while node > 0:
                line.add(node)
                node = self.shape.parents[node]
            above.append([other in line for other in pending])
        return torch.tensor(above)


@dataclass(frozen=True)
class AutoDrafts:
    """Settings: the drafter that belongs to the model or, where it has none, `TokenRecycling`.

    A drafter's tree has the size that suits the device (`default_tree`).

    Args:
        sampled: whether siblings are sampled at random, in a tree of fixed shape; else they are the likeliest.
    """

    sampled: bool = False

    def candidate_generator(self, context: DraftContext) -> CandidateGenerator:
        if context.drafter is None:
            return TokenRecycling(sampled=self.sampled).candidate_generator(context)
        return DrafterDrafts(context.drafter, default_tree(context.model.device, self.sampled)).candidate_generator(
            context
        )
