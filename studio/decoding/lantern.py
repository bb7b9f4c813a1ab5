"""LANTERN: speculative decoding in which a draft may stand in for codes that look like it.

"LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding" (arXiv:2410.03355) and
"LANTERN++" (arXiv:2502.06352: trees of fixed shape, a bound on the ratio). The loop is that of `speculative`, the tests
and what they guarantee are described in `acceptance`, and deviations from the authors' code in both.

LANTERN++ is the combination that suits drafts sampled at random: a fixed tree, and a bound on the ratio, under which a
token that the target excludes is never accepted, whatever its neighbours hold.

Which codes are close to each other: the latent neighbourhoods of LANTERN (arXiv:2410.03355, section 4).

Row x of a table lists all other codes by rising Euclidean distance, x itself left out, and holds the k columns that are
ever read. Deviation from the authors' code: distances are taken between unit vectors, because those are what LlamaGen's
image decoder looks up; `normalise=False` takes the stored vectors as they are.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from studio.checks import check_integer, set_fields
from studio.decoding.acceptance import Relaxation, check_budgets
from studio.decoding.drafts import DraftSource
from studio.decoding.eagle import AutoDrafts
from studio.decoding.jacobi import Jacobi
from studio.decoding.speculative import Speculative
from studio.errors import StudioError

_BLOCK = 512
_KEPT_TABLES = 4
_tables: "OrderedDict[tuple, torch.Tensor]" = OrderedDict()


def neighbour_table(codebook: torch.Tensor, k: int, normalise: bool = True) -> torch.Tensor:
    """The k nearest other codes (V, k), int32, of each code of a codebook (V, C); the last few tables are kept.

    Errors: `StudioError` unless k is from 1 to V - 1.
    """
    vocab = len(codebook)
    if not 1 <= k < vocab:
        raise StudioError(f"A codebook of {vocab} codes has neighbourhoods of 1 to {vocab - 1} codes, not {k}.")
    vectors = codebook.detach().float()
    digest = hashlib.sha256(vectors.cpu().contiguous().numpy().tobytes()).hexdigest()
    key = (digest, vectors.shape, k, normalise, vectors.device)
    if key not in _tables:
        _tables[key] = _nearest(F.normalize(vectors, dim=-1) if normalise else vectors, k)
        while len(_tables) > _KEPT_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _nearest(vectors: torch.Tensor, k: int) -> torch.Tensor:
    table = torch.empty(len(vectors), k, dtype=torch.int32, device=vectors.device)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        distances = torch.cdist(block, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(block), device=vectors.device)
        distances[own, start + own] = float("inf")
        table[start : start + _BLOCK] = distances.topk(k, dim=1, largest=False, sorted=True).indices
    return table


@dataclass(frozen=True)
class Lantern(Speculative):
    """Settings of relaxed speculative decoding.

    Args:
        k: nearest codes that count, at most the number of codes less one.
        delta: the total-variation distance in [0, 1] between the distribution of a sampled token and the target's, at
            most; 0 is
            lossless. None: no bound of this kind.
        ratio_budget: LANTERN++'s lambda: no token becomes likelier than lambda times its probability, lambda >= 1.
            None: no bound of this kind; with both, both hold.
        reference: the authors' rule, with stored code vectors compared as they are; it takes one of the bounds, and
            keeps neither.
        drafts, filter_order: as of `Speculative`.

    Greedy decoding has no distribution; a draft then counts with all that it may borrow, each draft on its own.

    Errors: `StudioError` for a value outside these ranges.
    """

    k: int = 1000
    delta: float | None = 0.1
    ratio_budget: float | None = None
    reference: bool = False

    def __post_init__(self):
        super().__post_init__()
        delta, ratio_budget = check_budgets(self.delta, self.ratio_budget, self.reference)
        set_fields(self, k=check_integer("k", self.k, 1), delta=delta, ratio_budget=ratio_budget)
        if self.reference and isinstance(self.drafts, Jacobi):
            raise StudioError("The authors' rule tests trees of drafts: leave reference out with Jacobi drafts.")

    def relaxation(self, codebook: torch.Tensor | None) -> Relaxation:
        """The rule, given the stored code vectors (V, C).

        Errors: `StudioError` without a codebook, and for one of too few codes.
        """
        if codebook is None:
            raise StudioError("Lantern needs a codebook with distances between its codes: use a VQ tokenizer.")
        if self.k >= len(codebook):
            raise StudioError(f"This codebook has {len(codebook)} codes: k must be below that, not {self.k}.")
        width = min(self.k + self.reference, len(codebook) - 1)
        table = neighbour_table(codebook, width, normalise=not self.reference)
        return Relaxation(table, self.k, self.delta, self.ratio_budget, self.reference)


@dataclass(frozen=True, kw_only=True)
class LanternPlusPlus(Lantern):
    """Settings of LANTERN++: sampled drafts in a tree of fixed shape, and a bound on the ratio.

    Args:
        k, ratio_budget: as of `Lantern`; the defaults are a setting of the authors.
        drafts: `AutoDrafts(sampled=True)`, `TokenRecycling(sampled=True)`, which needs no training, or
            `DrafterDrafts(drafter, StaticTree(...))`, or `Jacobi()`.
        delta, reference, filter_order: as of `Lantern`.

    Errors: `StudioError` for a value outside these ranges, without a ratio, and for drafts that are not sampled.
    """

    k: int = 10
    delta: float | None = None
    ratio_budget: float | None = 5.0
    drafts: DraftSource | Jacobi = AutoDrafts(sampled=True)

    def __post_init__(self):
        super().__post_init__()
        if self.ratio_budget is None:
            raise StudioError(
                "LANTERN++ bounds the ratio to the target's distribution: give ratio_budget, or use Lantern."
            )
        if not self.drafts.sampled:
            raise StudioError(
                "LANTERN++ tests drafts that are sampled in a tree of fixed shape: use AutoDrafts(sampled=True) or "
                f"DrafterDrafts(drafter, StaticTree(...)), not likeliest drafts of {type(self.drafts).__name__}."
            )
