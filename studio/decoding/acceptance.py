"""Whether drafted tokens stand in for the target's own: the tests at one node of a draft tree.

The siblings x_1, x_2, ... below a node are tried in order against the target's distribution p there. Sibling j passes
with probability `ratios[j]`, given that all before it failed; when all fail, the next token comes from `rest`. The
siblings of a node are weighed at once, without waiting for the device.

Lossless (`relaxation=None`): the token that comes out has distribution p.

- Deterministic drafts, as of a dynamic tree (EAGLE-2, arXiv:2406.16858): ratio p(x) over the mass not yet tried.
- Drafts sampled from a distribution q without replacement, as of a static tree (speculative sampling, arXiv:2211.17192;
several
  rounds, arXiv:2305.09781 and 2402.14160): ratio p(x) / q(x) with q renormalised over the tokens left, and after a
  failure p becomes max(p - q, 0), renormalised.

Relaxed (LANTERN, arXiv:2410.03355, and LANTERN++, arXiv:2502.06352): x may stand in for its nearest codes too. With c_i
the mass of its i nearest codes, it borrows the largest c_m within a budget. The rule here keeps what the budgets say:

- `tv_budget`, deterministic: the mass that siblings borrow is moved to them, once, at most `tv_budget` in all. The
  total-variation distance from p is then at most the budget, and equals the mass moved for a single sibling.
- `tv_budget`, sampled: weights w_j of reaching sibling j and raises a_j of its passing probability keep
  sum_j w_j a_j <= `tv_budget` for whatever drafts. Relaxed and lossless tests on the same random numbers differ with at
  most that probability, so the distance is at most the budget. (A bound on borrowed mass alone bounds nothing here, as
  many drafts may borrow the same mass.)
- `ratio_budget` (LANTERN++'s lambda): x borrows at most (lambda - 1) p(x), so that no token comes out with more than
  lambda p(x), and what p excludes never comes out. The distance is at most lambda - 1.

Deviations from the authors' code, undone by `reference=True`: a failure removes only what was borrowed, not the k + 1
nearest codes; budgets hold across siblings, not for each alone; an emptied distribution falls back to the one before,
not to all tokens alike. In both modes what is left of q is summed, not taken from 1, which would lose the tail of a
sharp q. The authors' single number `delta` is two options here, since it changes meaning at 1.
"""

from dataclasses import dataclass

import torch

from studio.checks import check_flag, check_number
from studio.errors import StudioError

_TINY = 1e-12


@dataclass(frozen=True)
class Relaxation:
    """How far a draft may stand in for its neighbours.

    Args:
        neighbours: nearest codes (V, at least k), as of `neighbour_table`; k + 1 columns where `reference` is set.
        k: nearest codes that count.
        tv_budget: mass in [0, 1] that may be moved at a node; None: no bound of this kind.
        ratio_budget: lambda of at least 1; None: no bound of this kind. With both, both hold.
        reference: the authors' rule, which takes one budget and keeps neither; a tv_budget of 1 is no bound there.

    Errors: `StudioError` for a value outside these ranges.
    """

    neighbours: torch.Tensor
    k: int
    tv_budget: float | None = None
    ratio_budget: float | None = None
    reference: bool = False

    def __post_init__(self):
        check_budgets(self.tv_budget, self.ratio_budget, self.reference)
        if not 1 <= self.k <= self.neighbours.shape[1]:
            raise StudioError(f"k must be from 1 to {self.neighbours.shape[1]}, the width of the table, not {self.k}.")


def check_budgets(
    tv_budget: float | None, ratio_budget: float | None, reference: bool
) -> tuple[float | None, float | None]:
    """Both budgets as Python's numbers. Raises: `StudioError` for budgets that cannot be used."""
    reference = check_flag("reference", reference)
    if tv_budget is None and ratio_budget is None:
        raise StudioError("Relaxed acceptance needs a bound: give the mass that may move, or the ratio, or both.")
    if reference and tv_budget is not None and ratio_budget is not None:
        raise StudioError("The authors' rule knows one bound: give the mass that may move or the ratio, not both.")
    if tv_budget is not None:
        tv_budget = check_number("delta, the probability that may move at a token,", tv_budget, 0, 1)
    if ratio_budget is not None:
        ratio_budget = check_number("The ratio that bounds a token", ratio_budget, 1)
    return tv_budget, ratio_budget


@dataclass
class Acceptance:
    """The siblings below R nodes: `ratios` (R, c), which are `tried` (R, c) at all, and the distribution `rest` (R, V).

    A sibling passes when a uniform number is at most its ratio; `rest` need not sum to 1.
    """

    ratios: torch.Tensor
    tried: torch.Tensor
    rest: torch.Tensor


def acceptance_probs(
    p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor | None = None, relaxation: Relaxation | None = None
) -> Acceptance:
    """Weighs the siblings below R nodes.

    Args:
        p: the target's distributions (R, V) there, after all filters.
        tokens: siblings (R, c) in the order in which they are tried, distinct; -1 where there is none.
        q: the distributions (R, V) that they were sampled from without replacement; None for deterministic drafts.
    """
    if q is not None:
        return _sampled(p, tokens, q, relaxation)
    if relaxation is not None and relaxation.reference:
        return _deterministic_reference(p, tokens, relaxation)
    return _deterministic(p, tokens, relaxation)


def _deterministic(p: torch.Tensor, tokens: torch.Tensor, relaxation: Relaxation | None) -> Acceptance:
    tried, x = tokens >= 0, tokens.clamp(min=0)
    if relaxation is None:
        gains = p.gather(1, x) * tried
        rest = p.scatter_add(1, x, -gains)
    else:
        gains, rest = _move_neighbours(p, x, tried, relaxation)
    reached = gains.double()
    reached = p.sum(1, keepdim=True, dtype=torch.float64) - (reached.cumsum(1) - reached)
    ratios = gains / reached.clamp(min=_TINY)
    return Acceptance(ratios, tried, _or_else(rest, p))


def _move_neighbours(p, x, tried, relaxation: Relaxation) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses (R, c) that siblings hold after borrowing in turn, and the distribution (R, V) of what is left without
    them."""
    rest, gains = p.clone(), []
    around = torch.cat((x[:, :, None], relaxation.neighbours[:, : relaxation.k][x].long()), dim=2)
    left = None if relaxation.tv_budget is None else p.new_full((len(p), 1), relaxation.tv_budget)
    for codes, exists in zip(around.unbind(1), tried.split(1, 1)):
        masses = rest.gather(1, codes)
        own = masses[:, :1]
        most = None if left is None else own + left
        bound = _smaller(most, None if relaxation.ratio_budget is None else relaxation.ratio_budget * own)
        staying = masses.masked_fill((masses.cumsum(1) <= bound) & exists, 0.0)
        gain = (masses - staying).sum(1, keepdim=True)
        rest.scatter_(1, codes, staying)
        left = None if left is None else most - gain
        gains.append(gain)
    return torch.cat(gains, dim=1), rest


def _deterministic_reference(p: torch.Tensor, tokens: torch.Tensor, relaxation: Relaxation) -> Acceptance:
    tried, ratios, wide = tokens >= 0, [], relaxation.neighbours[:, : relaxation.k + 1]
    for token, exists in zip(tokens.clamp(min=0).split(1, 1), tried.split(1, 1)):
        own = p.gather(1, token)
        _, masses, taken = _borrow(p, token, _reference_bound(own, relaxation), relaxation)
        ratios.append(own + (masses * taken).sum(1, keepdim=True))
        removed = p.scatter(1, token, 0.0)
        around = wide[token[:, 0]].long()
        removed = torch.where(taken.any(1, keepdim=True), removed.scatter(1, around, 0.0), removed)
        p = torch.where(exists, _normalised_or_uniform(removed), p)
    return Acceptance(torch.cat(ratios, dim=1), tried, p)


def _sampled(p: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor, relaxation: Relaxation | None) -> Acceptance:
    reference = relaxation is not None and relaxation.reference
    ratios, tests = [], []
    weight, spent = p.new_ones(len(p), 1), p.new_zeros(len(p), 1)
    for token in tokens.split(1, 1):
        exists, token = token >= 0, token.clamp(min=0)
        mass, left = q.gather(1, token), q.sum(1, keepdim=True)
        share = (mass / left).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * exists
        tested = share > 0
        own, distribution = p.gather(1, token), (q / left).nan_to_num(0.0, 0.0, 0.0)
        ratio = lossless = own / share.clamp(min=_TINY)
        if relaxation is not None:
            bound = _reference_bound(own, relaxation)
            if not reference:
                raised, left_over = None, relaxation.tv_budget
                if left_over is not None:
                    raised = (left_over - spent).clamp(min=0) / weight.clamp(min=_TINY) * share
                bound = _smaller(raised, None if relaxation.ratio_budget is None else bound)
            near, masses, taken = _borrow(p, token, bound, relaxation)
            ratio = (own + (masses * taken).sum(1, keepdim=True)) / share.clamp(min=_TINY)
            passes = ratio.clamp(max=1) * tested
            spent = spent + weight * (passes - lossless.clamp(max=1) * tested)
            weight = weight * (1 - passes)
            if reference:
                around = relaxation.neighbours[:, : relaxation.k + 1][token[:, 0]].long()
                distribution = torch.where(
                    taken.any(1, keepdim=True), distribution.scatter(1, around, 0.0), distribution
                )
        after = (p - distribution).clamp(min=0)
        after = _normalised_or_uniform(after) if reference else _normalised(_or_else(after, p))
        p = torch.where(tested, after, p)
        q = q.scatter_add(1, token, -mass * exists)
        ratios.append(ratio)
        tests.append(tested)
    if not ratios:
        return Acceptance(p.new_zeros(len(p), 0), tokens >= 0, p)
    return Acceptance(torch.cat(ratios, dim=1), torch.cat(tests, dim=1), p)


def _borrow(p, token, bound, relaxation: Relaxation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nearest codes (R, k) of a token (R, 1), their masses in p, and which of them it may borrow."""
    near = relaxation.neighbours[:, : relaxation.k][token[:, 0]].long()
    masses = p.gather(1, near)
    return near, masses, masses.cumsum(1) <= bound


def relaxed_mass(p: torch.Tensor, tokens: torch.Tensor, relaxation: Relaxation) -> torch.Tensor:
    """What tokens (R,) hold under p (R, V) with what they may borrow, each on its own (greedy tests)."""
    own = p.gather(1, tokens[:, None])
    _, masses, taken = _borrow(p, tokens[:, None], _reference_bound(own, relaxation), relaxation)
    return (own + (masses * taken).sum(1, keepdim=True))[:, 0]


def borrowed_mass(p: torch.Tensor, tokens: torch.Tensor, share: torch.Tensor, relaxation: Relaxation) -> torch.Tensor:
    """What single drafts (R,), sampled with probabilities `share` (R,), may borrow under p (R, V): (R,).

    With a `tv_budget` delta, at most delta * share: summed over all tokens that a draft may be, that is delta.
    """
    own = p.gather(1, tokens[:, None])
    raised = None if relaxation.tv_budget is None else relaxation.tv_budget * share[:, None]
    bound = _smaller(raised, None if relaxation.ratio_budget is None else (relaxation.ratio_budget - 1) * own)
    _, masses, taken = _borrow(p, tokens[:, None], bound, relaxation)
    return (masses * taken).sum(1)


def _reference_bound(own: torch.Tensor, relaxation: Relaxation) -> torch.Tensor:
    """Mass (R, 1) that each token may borrow when siblings are not counted together."""
    ratio = None if relaxation.ratio_budget is None else (relaxation.ratio_budget - 1) * own
    tv = relaxation.tv_budget
    flat = None if tv is None else torch.full_like(own, float("inf") if relaxation.reference and tv == 1 else tv)
    return _smaller(flat, ratio)


def _smaller(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor:
    if one is None or other is None:
        return other if one is None else one
    return torch.minimum(one, other)


def _or_else(distribution: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`distribution`, or the distribution before where rounding left nothing of it."""
    return torch.where(distribution.sum(1, keepdim=True) > 0, distribution, before)


def _normalised(distribution: torch.Tensor) -> torch.Tensor:
    return distribution / distribution.sum(1, keepdim=True)


def _normalised_or_uniform(distribution: torch.Tensor) -> torch.Tensor:
    total = distribution.sum(1, keepdim=True)
    return torch.where(total > 0, distribution / total.clamp(min=_TINY), 1 / distribution.shape[1])
