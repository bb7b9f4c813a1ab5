"""Drafts without training: the candidates that the target itself had when a token stood in the picture before.

Token recycling ("Turning Trash into Treasure", arXiv:2408.08696): a table keeps, for each token, the likeliest tokens
behind it when the target saw it last, in the picture or in a draft. A tree of fixed shape is filled from that table.
Deviation from the authors' code: every picture begins with an empty table of its own, so that a batch equals its single
calls; drafts that have no entry are left out.
"""

from dataclasses import dataclass

import torch

from studio.decoding.drafts import Memoryless, Progress, Setting
from studio.decoding.trees import StaticTree, Tree


@dataclass(frozen=True)
class Recycling:
    """Settings: the shape of the trees; the default is for a CPU, where every node costs."""

    tree: StaticTree = StaticTree(((0,), (1,), (0, 0), (0, 0, 0)))

    uses_states = False

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    def begin(self, setting: Setting) -> "_RecyclingDrafting":
        return _RecyclingDrafting(self.tree, setting)


class _RecyclingDrafting(Memoryless):
    def __init__(self, shape: StaticTree, setting: Setting):
        self.shape = shape
        size = (setting.batch, setting.model.config.vocab_size, shape.width)
        self.candidates = torch.full(size, -1, dtype=torch.int32, device=setting.model.device)

    def propose(self, progress: Progress) -> Tree:
        roots, shape = progress.roots, self.shape
        rows = torch.arange(len(roots), device=roots.device)
        tokens = [roots]
        for parent, rank, depth in list(zip(shape.parents, shape.ranks, shape.depths))[1:]:
            above = tokens[parent]
            drafted = self.candidates[rows, above.clamp(min=0), rank].long()
            tokens.append(torch.where((above >= 0) & (progress.room >= depth), drafted, -1))
        tokens = torch.stack(tokens, dim=1)
        parents = torch.tensor(shape.parents, device=roots.device).expand_as(tokens)
        exists = tokens >= 0
        size = 1 + int(torch.nonzero(exists.any(dim=0))[-1])
        return Tree(tokens.clamp(min=0)[:, :size], parents.masked_fill(~exists, -1)[:, :size])

    def observe(self, tree: Tree, logits: torch.Tensor) -> None:
        best = logits.topk(min(self.shape.width, logits.shape[-1]), dim=-1).indices.int()
        exists = tree.parents >= 0
        exists[:, 0] = True
        rows = torch.arange(len(best), device=best.device)
        for node in range(best.shape[1]):
            token, width = tree.tokens[:, node], best.shape[2]
            known = self.candidates[rows, token, :width]
            self.candidates[rows, token, :width] = torch.where(exists[:, node, None], best[:, node], known)

    def select(self, pictures: torch.Tensor, rows: torch.Tensor) -> None:
        self.candidates = self.candidates[pictures]
