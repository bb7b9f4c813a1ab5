"""The acceptance rule of LANTERN's authors (arXiv:2410.03355), for tests, benchmarks and their published numbers.

It takes one of the bounds, and keeps neither: when a draft fails, its whole neighbourhood loses its probability, not
only what was borrowed; each sibling has the budget for itself; an emptied distribution becomes the uniform one; and
neighbours are sought among the stored vectors, not the unit vectors that are decoded.
"""

from dataclasses import dataclass, field

import torch

from studio.decoding.drafts import Drafts
from studio.decoding.eagle import AutoDrafts
from studio.decoding.jacobi import Jacobi
from studio.decoding.lantern import Lantern, Relaxation, neighbour_table
from studio.decoding.verification import Acceptance, take_proposal
from studio.errors import StudioError

_TINY = 1e-12


@dataclass(frozen=True)
class AuthorsRelaxation(Relaxation):
    """As of `Relaxation`, by the authors' rule.

    Args:
        neighbours: (V, k + 1), or as many columns as there are other codes.
        tv_budget: 1 is no bound.

    Raises:
        StudioError: for a value outside the ranges of `Relaxation`, and for two bounds.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tv_budget is not None and self.ratio_budget is not None:
            raise StudioError("The authors' rule knows one bound: give the mass that may move or the ratio, not both.")

    def _deterministic(self, p: torch.Tensor, tokens: torch.Tensor) -> Acceptance:
        tried, ratios = tokens >= 0, []
        for token, exists in zip(tokens.clamp(min=0).split(1, 1), tried.split(1, 1)):
            own = p.gather(1, token)
            bound = self._alone(own)
            ratios.append(own + self._borrowed(p, token, bound))
            removed = self._without_neighbours(p, token, bound, p.scatter(1, token, 0.0))
            p = torch.where(exists, _normalised_or_uniform(removed), p)
        return Acceptance(torch.cat(ratios, dim=1), tried, p)

    def _sampled(self, p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor) -> Acceptance:
        ratios, tests = [p.new_zeros(len(p), 0)], [tokens.new_zeros(len(p), 0).bool()]
        for token in tokens.split(1, 1):
            share, proposal, q = take_proposal(q, token)
            tested, token = share > 0, token.clamp(min=0)
            own = p.gather(1, token)
            bound = self._alone(own)
            ratios.append((own + self._borrowed(p, token, bound)) / share.clamp(min=_TINY))
            proposal = self._without_neighbours(p, token, bound, proposal)
            p = torch.where(tested, _normalised_or_uniform((p - proposal).clamp(min=0)), p)
            tests.append(tested)
        return Acceptance(torch.cat(ratios, dim=1), torch.cat(tests, dim=1), p)

    def _alone(self, own: torch.Tensor) -> torch.Tensor:
        return torch.full_like(own, float("inf")) if self.tv_budget == 1 else super()._alone(own)

    def _without_neighbours(
        self, p: torch.Tensor, token: torch.Tensor, bound: torch.Tensor, distribution: torch.Tensor
    ) -> torch.Tensor:
        """`distribution` (R, V) without the k + 1 nearest codes of tokens (R, 1), where those may borrow any."""
        borrows = p.gather(1, self.neighbours[:, :1][token[:, 0]].long()) <= bound
        around = self.neighbours[:, : self.k + 1][token[:, 0]].long()
        return torch.where(borrows, distribution.scatter(1, around, 0.0), distribution)


@dataclass(frozen=True)
class AuthorsLantern(Lantern):
    """`Lantern` with the authors' rule, which tests trees of drafts; of `delta` and `ratio` it takes one."""

    drafts: Drafts | Jacobi = field(default=AutoDrafts(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.drafts, Jacobi):
            raise StudioError("The authors' rule tests trees of drafts: use Lantern with Jacobi drafts.")

    def rule(self, codebook: torch.Tensor | None) -> AuthorsRelaxation:
        """The rule, given the stored code vectors (V, C)."""
        codebook = self.checked(codebook)
        table = neighbour_table(codebook, min(self.k + 1, len(codebook) - 1), normalise=False)
        return AuthorsRelaxation(table, self.k, self.delta, self.ratio)


def _normalised_or_uniform(distribution: torch.Tensor) -> torch.Tensor:
    total = distribution.sum(1, keepdim=True)
    return torch.where(total > 0, distribution / total.clamp(min=_TINY), 1 / distribution.shape[1])
