"""Drafts without training: the candidates that the target itself had when a token stood in the picture before.

Token recycling ("Turning Trash into Treasure", arXiv:2408.08696): a table keeps, for each token, the likeliest tokens
behind it when the target saw it last, in the picture or in a draft. A tree of fixed shape is filled from that table.
Deviations from the authors' code: every picture begins with an empty table of its own, so that a batch equals its
single calls; drafts that have no entry are left out; drafts can be drawn from the probabilities that the candidates had
then, as LANTERN++ wants them, and not only be the likeliest.
"""

from dataclasses import dataclass

import torch

from studio.checks import check_integer, set_fields
from studio.decoding.drafts import Drafting, Memoryless, Progress, Setting
from studio.decoding.sampling import exponential_noise
from studio.decoding.trees import MAX_NODES, StaticTree, Tree, trees_of


@dataclass(frozen=True)
class Recycling:
    """Settings.

    Args:
        tree: the shape of the trees; the default is for a CPU, where every node costs.
        drawn: whether siblings are drawn without replacement from the candidates' probabilities; else, and when the
            target is greedy, they are the likeliest.
        candidates: how many the table keeps for a token that drafts are drawn for, at least the width of the tree.

    Errors: `StudioError` for a number of candidates below 1.
    """

    tree: StaticTree = StaticTree(((0,), (1,), (0, 0), (0, 0, 0)))
    drawn: bool = False
    candidates: int = 8

    def __post_init__(self):
        set_fields(self, candidates=check_integer("candidates of recycled drafts", self.candidates, 1, MAX_NODES))

    def begin(self, setting: Setting) -> Drafting:
        if self.drawn and not setting.sampling.greedy:
            return _RecycledDraws(self.tree, max(self.candidates, self.tree.width), setting)
        return _Recycled(self.tree, setting)


class _Recycled(Memoryless):
    """For each picture the likeliest tokens behind each token that was seen, and trees filled in their order."""

    def __init__(self, shape: StaticTree, setting: Setting):
        self.shape, self.nodes = shape, shape.nodes
        self.likeliest: list[dict[int, list[int]]] = [{} for _ in range(setting.batch)]

    def propose(self, progress: Progress) -> Tree:
        rows = zip(self.likeliest, progress.roots.tolist(), progress.room.tolist())
        return trees_of([self._filled(*row) for row in rows], progress.tokens.device)

    def _filled(self, likeliest: dict[int, list[int]], root: int, room: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one tree; drafts without an entry are left out."""
        shape, tokens, parents, number = self.shape, [root], [-1], {0: 0}
        for node in range(1, shape.nodes):
            above, rank = number.get(shape.parents[node]), shape.ranks[node]
            if above is None or shape.depths[node] > room:
                continue
            candidates = likeliest.get(tokens[above], ())
            if rank < len(candidates):
                number[node] = len(tokens)
                tokens.append(candidates[rank])
                parents.append(above)
        return tokens, parents

    def observe(self, tree: Tree, logits: torch.Tensor) -> None:
        best = logits.topk(min(self.shape.width, logits.shape[-1]), dim=-1).indices.tolist()
        for likeliest, tokens, parents, seen in zip(self.likeliest, tree.token_lists, tree.parents.tolist(), best):
            likeliest.update(
                (tokens[node], seen[node]) for node in range(len(tokens)) if node == 0 or parents[node] >= 0
            )

    def select(self, pictures: list[int], rows: list[int]) -> None:
        self.likeliest = [self.likeliest[picture] for picture in pictures]


class _RecycledDraws(Memoryless):
    """Candidates (B, V, kept), -1 where there is none, their probabilities after filters, and trees drawn of them."""

    def __init__(self, shape: StaticTree, kept: int, setting: Setting):
        self.shape, self.kept, self.nodes, self.sampling = shape, kept, shape.nodes, setting.sampling
        size, device = (setting.batch, setting.model.config.vocab_size, kept), setting.model.device
        self.candidates = torch.full(size, -1, dtype=torch.int32, device=device)
        self.masses = torch.zeros(size, device=device)

    def propose(self, progress: Progress) -> Tree:
        roots, shape = progress.roots, self.shape
        (batch, vocab, kept), count = self.candidates.shape, len(shape.expanded)
        rows = torch.arange(batch, device=roots.device)
        races = [exponential_noise(count, kept, [one] * count, roots.device) for one in progress.generators]
        tokens = torch.full((batch, shape.nodes), -1, device=roots.device)
        tokens[:, 0] = roots
        laws = torch.zeros(batch, count, vocab, device=roots.device)
        proposal_rows = torch.full((shape.nodes,), -1, device=roots.device)
        for place, (node, race) in enumerate(zip(shape.expanded, torch.stack(races, dim=1))):
            above = tokens[:, node].clamp(min=0)
            codes = self.candidates[rows, above].clamp(min=0).long()
            masses = self.masses[rows, above] * (tokens[:, node, None] >= 0)
            laws[:, place].scatter_add_(1, codes, masses)
            proposal_rows[node] = place
            children = [child for child, parent in enumerate(shape.parents) if parent == node]
            won = (masses / race).topk(len(children), dim=1)
            exists = (won.values > 0) & (progress.room[:, None] > shape.depths[node])
            tokens[:, children] = torch.where(exists, codes.gather(1, won.indices), -1)
        parents = torch.tensor(shape.parents, device=tokens.device).expand_as(tokens)
        exists = tokens >= 0
        size = 1 + int(torch.nonzero(exists.any(dim=0))[-1])
        parents = parents.masked_fill(~exists, -1)[:, :size]
        return Tree(tokens.clamp(min=0)[:, :size], parents, laws, proposal_rows)

    def observe(self, tree: Tree, logits: torch.Tensor) -> None:
        laws = self.sampling.probabilities(logits.flatten(0, 1)).view_as(logits)
        best = laws.topk(min(self.kept, laws.shape[-1]), dim=-1)
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

    def select(self, pictures: list[int], rows: list[int]) -> None:
        self.candidates, self.masses = self.candidates[pictures], self.masses[pictures]
