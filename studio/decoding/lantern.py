"""LANTERN: speculative decoding in which a draft may stand in for codes that look like it.

"LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding" (arXiv:2410.03355) and
"LANTERN++" (arXiv:2502.06352: trees of fixed shape, a bound on the ratio). The loop is that of `speculative`; this file
holds the settings, the relaxed acceptance rule (`Relaxation.probs`), and which codes are close to each other (section
4: by Euclidean distance in the codebook).

A draft x borrows the mass of its nearest codes: with c_i the mass of its i nearest codes, the largest c_m within a
budget. The rule keeps what the budgets say:

- `tv_budget`, deterministic: the mass that siblings borrow is moved to them, once, at most `tv_budget` in all. The
  total-variation distance from p is then at most the budget, and equals the mass moved for a single sibling.
- `tv_budget`, sampled: weights w_j of reaching sibling j and raises a_j of its passing probability keep
  sum_j w_j a_j <= `tv_budget` for whatever drafts. Relaxed and lossless tests on the same random numbers differ with at
  most that probability, so the distance is at most the budget. (A bound on borrowed mass alone bounds nothing here, as
  many drafts may borrow the same mass.)
- `ratio_budget` (LANTERN++'s lambda): x borrows at most (lambda - 1) p(x), so that no token comes out with more than
  lambda p(x), and what p excludes never comes out. The distance is at most lambda - 1.

LANTERN++ is the combination that suits drafts sampled at random: a fixed tree, and a bound on the ratio, under which a
token that the target excludes is never accepted, whatever its neighbours hold.

Deviations from the authors' code, whose own rule is in `studio.reference.lantern`: a failure removes only what was
borrowed, not the k + 1 nearest codes; budgets hold across siblings, not for each alone; an emptied distribution falls
back to the one before, not to the uniform one; distances are taken between unit vectors, because those are what
LlamaGen's image decoder looks up. The authors' single number `delta` is two options here, since it changes meaning at
1.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from studio.checks import check_integer, check_number, set_fields
from studio.decoding.speculative import Speculative
from studio.decoding.verification import Acceptance, or_else, ratios_in_turn, residual, take_proposal
from studio.errors import StudioError

_TINY = 1e-12
_BLOCK = 512
_KEPT_TABLES = 4
_tables: "OrderedDict[tuple, torch.Tensor]" = OrderedDict()


def neighbour_table(codebook: torch.Tensor, k: int, normalise: bool = True) -> torch.Tensor:
    """The k nearest other codes of each code, by rising distance; the last few tables are kept.

    Args:
        codebook: (V, C).
        k: 1 to V - 1.
        normalise: whether distances are between unit vectors; else between the stored ones.

    Returns:
        Codes (V, k), int32.

    Raises:
        StudioError: unless k is from 1 to V - 1.
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
class Relaxation:
    """The relaxed acceptance rule: how far a draft may stand in for its neighbours.

    Args:
        neighbours: nearest codes (V, at least k), as of `neighbour_table`.
        k: nearest codes that count.
        tv_budget: mass in [0, 1] that may be moved at a node; None: no bound of this kind.
        ratio_budget: lambda of at least 1; None: no bound of this kind. With both, both hold.

    Raises:
        StudioError: for a value outside these ranges.
    """

    neighbours: torch.Tensor
    k: int
    tv_budget: float | None = None
    ratio_budget: float | None = None

    def __post_init__(self) -> None:
        check_budgets(self.tv_budget, self.ratio_budget)
        if not 1 <= self.k <= self.neighbours.shape[1]:
            raise StudioError(f"k must be from 1 to {self.neighbours.shape[1]}, the width of the table, not {self.k}.")

    def probs(self, p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor | None = None) -> Acceptance:
        """Acceptance probabilities of the siblings below R nodes, as of `AcceptanceRule`."""
        return self._deterministic(p, tokens) if q is None else self._sampled(p, tokens, q)

    def _deterministic(self, p: torch.Tensor, tokens: torch.Tensor) -> Acceptance:
        """Siblings borrow in turn: what one has moved to itself is gone for the next."""
        tried, x = tokens >= 0, tokens.clamp(min=0)
        left_over, gains = p.clone(), []
        around = torch.cat((x[:, :, None], self.neighbours[:, : self.k][x].long()), dim=2)
        budget = None if self.tv_budget is None else p.new_full((len(p), 1), self.tv_budget)
        for codes, exists in zip(around.unbind(1), tried.split(1, 1)):
            masses = left_over.gather(1, codes)
            own = masses[:, :1]
            most = None if budget is None else own + budget
            bound = _smaller(most, None if self.ratio_budget is None else self.ratio_budget * own)
            staying = masses.masked_fill((masses.cumsum(1) <= bound) & exists, 0.0)
            gain = (masses - staying).sum(1, keepdim=True)
            left_over.scatter_(1, codes, staying)
            budget = None if most is None else most - gain
            gains.append(gain)
        return Acceptance(ratios_in_turn(p, torch.cat(gains, dim=1)), tried, or_else(left_over, p))

    def _sampled(self, p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor) -> Acceptance:
        """`weight` is the probability of reaching a sibling, `spent` what its elders have used of the budget."""
        ratios, tests = [p.new_zeros(len(p), 0)], [tokens.new_zeros(len(p), 0).bool()]
        weight, spent = p.new_ones(len(p), 1), p.new_zeros(len(p), 1)
        for token in tokens.split(1, 1):
            share, proposal, q = take_proposal(q, token)
            tested, token = share > 0, token.clamp(min=0)
            own = p.gather(1, token)
            raised = None
            if self.tv_budget is not None:
                raised = (self.tv_budget - spent).clamp(min=0) / weight.clamp(min=_TINY) * share
            ratio = (own + self._borrowed(p, token, self._within(own, raised))) / share.clamp(min=_TINY)
            lossless = own / share.clamp(min=_TINY)
            passes = ratio.clamp(max=1) * tested
            spent = spent + weight * (passes - lossless.clamp(max=1) * tested)
            weight = weight * (1 - passes)
            p = torch.where(tested, residual(p, proposal), p)
            ratios.append(ratio)
            tests.append(tested)
        return Acceptance(torch.cat(ratios, dim=1), torch.cat(tests, dim=1), p)

    def is_likeliest(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens (R, c) would be the likeliest behind nodes with logits (R, V), each with what it may borrow."""
        likeliest = tokens == logits.argmax(dim=-1)[:, None]
        p = logits.float().softmax(dim=-1)
        top, places = p.topk(2, dim=-1)
        others = torch.where(tokens == places[:, :1], top[:, 1:], top[:, :1])
        flat, x = p.repeat_interleave(tokens.shape[1], dim=0), tokens.clamp(min=0).view(-1, 1)
        own = flat.gather(1, x)
        held = own + self._borrowed(flat, x, self._alone(own))
        return ((held.view_as(others) > others) | likeliest) & (tokens >= 0)

    def borrowed_mass(self, p: torch.Tensor, tokens: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """What single drafts may borrow (R,), tokens (R,) sampled with probabilities `share` (R,), under p (R, V).

        With a `tv_budget` delta, at most delta * share: summed over all tokens that a draft may be, that is delta.
        """
        raised = None if self.tv_budget is None else self.tv_budget * share[:, None]
        return self._borrowed(p, tokens[:, None], self._within(p.gather(1, tokens[:, None]), raised))[:, 0]

    def _alone(self, own: torch.Tensor) -> torch.Tensor:
        """Mass (R, 1) that tokens of masses `own` (R, 1) may borrow when siblings are not counted together."""
        return self._within(own, None if self.tv_budget is None else torch.full_like(own, self.tv_budget))

    def _within(self, own: torch.Tensor, raised: torch.Tensor | None) -> torch.Tensor:
        """The smaller bound (R, 1): `raised`, and that of the ratio for tokens of masses `own` (R, 1)."""
        return _smaller(raised, None if self.ratio_budget is None else (self.ratio_budget - 1) * own)

    def _borrowed(self, p: torch.Tensor, token: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        """The largest mass (R, 1) within a bound (R, 1) of the nearest codes of tokens (R, 1) under p (R, V)."""
        masses = p.gather(1, self.neighbours[:, : self.k][token[:, 0]].long())
        return (masses * (masses.cumsum(1) <= bound)).sum(1, keepdim=True)


def _smaller(*bounds: torch.Tensor | None) -> torch.Tensor:
    """The smaller of two bounds, of which one may be missing."""
    given = [bound for bound in bounds if bound is not None]
    return given[0] if len(given) == 1 else torch.minimum(*given)


def check_budgets(tv_budget: float | None, ratio_budget: float | None) -> tuple[float | None, float | None]:
    """Both budgets as Python's numbers.

    Raises:
        StudioError: for budgets that cannot be used.
    """
    if tv_budget is None and ratio_budget is None:
        raise StudioError("Relaxed acceptance needs a bound: give the mass that may move, or the ratio, or both.")
    if tv_budget is not None:
        tv_budget = check_number("delta, the probability that may move at a token,", tv_budget, 0, 1)
    if ratio_budget is not None:
        ratio_budget = check_number("The ratio that bounds a token", ratio_budget, 1)
    return tv_budget, ratio_budget


@dataclass(frozen=True)
class Lantern(Speculative):
    """Settings of relaxed speculative decoding.

    Args:
        k: nearest codes that count, at most the number of codes less one.
        delta: the total-variation distance in [0, 1] between the distribution of a sampled token and the target's, at
            most; 0 is lossless. None: no bound of this kind.
        ratio: LANTERN++'s lambda: no token becomes likelier than lambda times its probability, lambda >= 1. None: no
            bound of this kind; with both, both hold.
        drafts, filter_order, weights, guidance_schedule: as of `Speculative`.

    Greedy decoding has no distribution; a draft then counts with all that it may borrow, each draft on its own.

    Raises:
        StudioError: for a value outside these ranges.
    """

    k: int = 1000
    delta: float | None = 0.1
    ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        delta, ratio = check_budgets(self.delta, self.ratio)
        set_fields(self, k=check_integer("k", self.k, 1), delta=delta, ratio=ratio)

    def rule(self, codebook: torch.Tensor | None) -> Relaxation:
        """The rule, given the stored code vectors (V, C).

        Raises:
            StudioError: without a codebook, and for one of too few codes.
        """
        return Relaxation(neighbour_table(self.checked(codebook), self.k), self.k, self.delta, self.ratio)

    def checked(self, codebook: torch.Tensor | None) -> torch.Tensor:
        """The codebook, where it has neighbourhoods of k codes; else a `StudioError`."""
        if codebook is None:
            raise StudioError("Lantern needs a codebook with distances between its codes: use a VQ tokenizer.")
        if self.k >= len(codebook):
            raise StudioError(f"This codebook has {len(codebook)} codes: k must be below that, not {self.k}.")
        return codebook


@dataclass(frozen=True, kw_only=True)
class LanternPlusPlus(Lantern):
    """Settings of LANTERN++: sampled drafts in a tree of fixed shape, and a bound on the ratio.

    Args:
        k, ratio: as of `Lantern`; the defaults are a setting of the authors.
        drafts: `Jacobi()`, `AutoDrafts(sampled=True)`, `TokenRecycling(sampled=True)` or
            `DrafterDrafts(drafter, StaticTree(...))`.
        delta, filter_order, weights, guidance_schedule: as of `Lantern`.

    Raises:
        StudioError: for a value outside these ranges, without a ratio, and for drafts that are not sampled.
    """

    k: int = 10
    delta: float | None = None
    ratio: float | None = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            raise StudioError("LANTERN++ bounds the ratio to the target's distribution: give ratio, or use Lantern.")
        if not self.drafts.sampled:
            raise StudioError(
                "LANTERN++ tests drafts that are sampled, in a tree of fixed shape: use Jacobi(), "
                "AutoDrafts(sampled=True) or DrafterDrafts(drafter, StaticTree(...)), not likeliest drafts of "
                f"{type(self.drafts).__name__}."
            )
