"""The map of Distilled Decoding (arXiv:2412.17153) from Gaussian noise to a token of a given distribution.

A categorical sample becomes a function of a Gaussian vector e: along x_t = (1 - t) e + t q (t = 0 noise, t = 1 data)
the flow-matching ODE dx/dt = (D(x, t) - x) / (1 - t) carries e to a code vector c_j, and token j comes out with exactly
probability p_j. D is the posterior mean: weights softmax_j(log p_j - |x - t c_j|^2 / (2 (1 - t)^2)) over the codebook.

The authors released neither this map nor its solver, so the solver is ours. In z = x / t and sigma = (1 - t) / t the
ODE is dz/dlog(sigma) = z - D, and a step with frozen D is exact: z' = D + (sigma' / sigma) (z - D). `multistep` starts
from the expansion z = sigma e + mean + covariance e / (2 sigma) of the flow at large sigma, steps evenly in log sigma
with D extrapolated from two points, and follows rows that have not settled on one code until they have. `euler` is the
plain uniform grid in t, `rk4` a dense float64 reference. The map does not change when the codebook is shifted, scaled
or turned; the codebook is centred for precision.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from studio.checks import check_integer, shown
from studio.errors import StudioError

METHODS = ("multistep", "euler", "rk4")
BLOCK = 4096
MAX_STEPS = 100_000
_SETTLED = 0.99
_TAIL_FACTOR = 0.75
_TAIL_CANDIDATES = 256
_FLOOR = 1e-4
_MEASURED_CODES = 2048
_SPARSE = 4
"""How many times more codes there must be than possible ones, for a table of its own for each row to pay."""
_SMALLEST_LOG_WEIGHT = -80.0
"""Far below any rounding, and above the subnormal numbers that processors treat slowly."""


class Posterior(NamedTuple):
    """Of each row: `mean` (B, C) of the codes, the likeliest `token` (B,) and its `weight` (B,) in (0, 1].

    `token` is None where only the mean was asked for.
    """

    mean: torch.Tensor
    token: torch.Tensor | None
    weight: torch.Tensor


class Flow:
    """The posterior over a codebook (V, C) with prior log_probs (B, V), computed in blocks of codes."""

    def __init__(self, log_probs: torch.Tensor, codebook: torch.Tensor, block: int = BLOCK) -> None:
        self.log_probs, self.codebook, self.block = log_probs, codebook, block
        self.half_norms = codebook.square().sum(dim=-1) / 2
        if codebook.ndim == 2:
            self._in = torch.cat((codebook, -self.half_norms[:, None]), dim=1)
            self._out = torch.cat((codebook, torch.ones_like(self.half_norms[:, None])), dim=1)

    def of_rows(self, rows: torch.Tensor) -> "Flow":
        """The flow of these rows alone."""
        return Flow(self.log_probs[rows], self.codebook, self.block)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Inner products (B, V) of x (B, C) with the codes."""
        return x @ self.codebook.T

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums (B, C) of the codes by weights (B, V)."""
        return weights @ self.codebook

    def codes(self, indices: torch.Tensor) -> torch.Tensor:
        """The codes (B, k, C) of indices (B, k)."""
        return self.codebook[indices]

    def tokens(self, indices: torch.Tensor) -> torch.Tensor:
        """The tokens of indices (B, 1), as (B,)."""
        return indices[:, 0]

    def at_time(self, x: torch.Tensor, t: float, pick: bool = True) -> Posterior:
        """At x (B, C) and time t in [0, 1); `pick` asks for the token too."""
        return self._posterior(x * (t / (1 - t) ** 2), (t / (1 - t)) ** 2, pick)

    def at_sigma(self, z: torch.Tensor, sigma: float, pick: bool = True) -> Posterior:
        """At z = x / t (B, C) and sigma = (1 - t) / t above 0; `pick` asks for the token too."""
        return self._posterior(z / sigma**2, 1 / sigma**2, pick)

    def _posterior(self, query: torch.Tensor, precision: float, pick: bool) -> Posterior:
        """Weights softmax_j(log p_j + <query, c_j> - precision |c_j|^2 / 2), in one pass over the codes.

        One more column in the products carries the norms in and the sum of the weights out.
        """
        rows = len(query)
        best = query.new_full((rows, 1), torch.finfo(query.dtype).min)
        sums = query.new_zeros(rows, self._out.shape[1])
        token = torch.zeros(rows, 1, dtype=torch.long, device=query.device) if pick else None
        query = torch.cat((query, query.new_full((rows, 1), precision)), dim=1)
        for start in range(0, len(self.codebook), self.block):
            part = slice(start, start + self.block)
            logits = torch.addmm(self.log_probs[:, part], query, self._in[part].T)
            above = torch.maximum(best, logits.amax(dim=-1, keepdim=True))
            if token is not None:
                token = torch.where(above > best, logits.argmax(dim=-1, keepdim=True) + start, token)
            weights = logits.sub_(above).clamp_(min=_SMALLEST_LOG_WEIGHT).exp_()
            sums = torch.addmm(sums * (best - above).exp(), weights, self._out[part])
            best = above
        return Posterior(sums[:, :-1] / sums[:, -1:], None if token is None else token[:, 0], 1 / sums[:, -1])


class SupportFlow(Flow):
    """The posterior where few codes are possible: each row has its own codes (B, k, C), by their tokens (B, k)."""

    def __init__(self, log_probs: torch.Tensor, codes: torch.Tensor, support: torch.Tensor) -> None:
        super().__init__(log_probs, codes)
        self.support = support

    def of_rows(self, rows: torch.Tensor) -> "SupportFlow":
        return SupportFlow(self.log_probs[rows], self.codebook[rows], self.support[rows])

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return (self.codebook @ x[:, :, None])[:, :, 0]

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        return (weights[:, None] @ self.codebook)[:, 0]

    def codes(self, indices: torch.Tensor) -> torch.Tensor:
        return self.codebook.gather(1, indices[:, :, None].expand(-1, -1, self.codebook.shape[2]))

    def tokens(self, indices: torch.Tensor) -> torch.Tensor:
        return self.support.gather(1, indices)[:, 0]

    def _posterior(self, query: torch.Tensor, precision: float, pick: bool) -> Posterior:
        weights = (self.log_probs + self.scores(query) - precision * self.half_norms).softmax(dim=-1)
        weight, index = weights.max(dim=-1, keepdim=True)
        return Posterior(self.mix(weights), self.tokens(index) if pick else None, weight[:, 0])


def _picked(posterior: Posterior) -> torch.Tensor:
    assert posterior.token is not None
    return posterior.token


def euler(flow: Flow, noise: torch.Tensor, steps: int) -> tuple[Posterior, torch.Tensor]:
    """Steps of 1 / steps in t; the posterior at the last of them, and x_1 (B, C), which is its mean."""
    x, found = noise, None
    for step in range(steps):
        t, following = step / steps, (step + 1) / steps
        found = flow.at_time(x, t, pick=step + 1 == steps)
        x = ((1 - following) / (1 - t)) * x + ((following - t) / (1 - t)) * found.mean
    assert found is not None
    return found, x


def start(flow: Flow, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """z (B, C) at a large sigma, from the expansion of the flow up to terms of order sigma^-2."""
    probs = flow.log_probs.exp()
    mean = flow.mix(probs)
    spread = flow.mix(probs * flow.scores(noise)) - mean * (mean * noise).sum(dim=-1, keepdim=True)
    return sigma * noise + mean + spread / (2 * sigma)


def multistep(flow: Flow, noise: torch.Tensor, sigmas: list[float], floor: float) -> torch.Tensor:
    """Tokens (B,) by two-point steps over falling, log-spaced sigmas; unsettled rows go on to `floor` at most."""
    z, before = start(flow, noise, sigmas[0]), None
    for sigma, following in pairwise(sigmas):
        mean = flow.at_sigma(z, sigma, pick=False).mean
        ahead = mean if before is None else mean + (mean - before) / 2
        z, before = ahead + (following / sigma) * (z - ahead), mean
    found = flow.at_sigma(z, sigmas[-1])
    unsettled = (found.weight < _SETTLED).nonzero()[:, 0]
    assert found.token is not None and before is not None
    if len(unsettled) == 0:
        return found.token
    ratio = math.log(1 / _TAIL_FACTOR) / math.log(sigmas[-2] / sigmas[-1])
    tokens = found.token.clone()
    tokens[unsettled] = _tail(flow.of_rows(unsettled), z[unsettled], before[unsettled], ratio, sigmas[-1], floor)
    return tokens


def _tail(flow: Flow, z, before, ratio: float, sigma: float, floor: float) -> torch.Tensor:
    """Tokens of rows that were still between codes: smaller and smaller steps among their likeliest codes.

    Differences to the codes are taken directly, so that near-duplicates are told apart in float32. Exact duplicates
    never settle; the floor ends them, and either token has the same code.
    """
    logits = flow.log_probs + (flow.scores(z) - flow.half_norms) / sigma**2
    candidates = logits.topk(min(_TAIL_CANDIDATES, logits.shape[-1]), dim=-1).indices.sort(dim=-1).values
    codes, log_probs = flow.codes(candidates), flow.log_probs.gather(-1, candidates)
    while True:
        weights = (log_probs - (z[:, None] - codes).square().sum(dim=-1) / (2 * sigma**2)).softmax(dim=-1)
        weight, index = weights.max(dim=-1)
        if sigma < floor or bool((weight >= _SETTLED).all()):
            return flow.tokens(candidates.gather(-1, index[:, None]))
        mean = (weights[:, :, None] * codes).sum(dim=1)
        ahead = mean + (ratio / 2) * (mean - before)
        z, before, ratio = ahead + _TAIL_FACTOR * (z - ahead), mean, 1.0
        sigma *= _TAIL_FACTOR


def rk4(flow: Flow, noise: torch.Tensor, sigmas: list[float]) -> tuple[Posterior, torch.Tensor]:
    """Classical Runge-Kutta steps in log sigma; the posterior at the last sigma and z (B, C) there."""

    def slope(z, log_sigma):
        return z - flow.at_sigma(z, math.exp(log_sigma), pick=False).mean

    z = start(flow, noise, sigmas[0])
    for here, there in pairwise(math.log(sigma) for sigma in sigmas):
        step, middle = there - here, (here + there) / 2
        first = slope(z, here)
        second = slope(z + step / 2 * first, middle)
        third = slope(z + step / 2 * second, middle)
        fourth = slope(z + step * third, there)
        z = z + step / 6 * (first + 2 * second + 2 * third + fourth)
    return flow.at_sigma(z, sigmas[-1]), z


def log_spaced(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from `first` to `last` with a constant ratio."""
    return torch.logspace(math.log10(first), math.log10(last), count, dtype=torch.float64).tolist()


def codebook_scales(codebook: torch.Tensor) -> tuple[float, float]:
    """Root-mean-square distance of the codes (V, C) from their mean, and the median distance to the nearest other code.

    Repeated codes do not count as neighbours; both are 1 where all codes are equal. The median is taken over about 2048
    codes of a large codebook, since it only places the solver's grid.
    """
    codes = codebook.detach().to("cpu", torch.float64)
    codes = codes - codes.mean(dim=0)
    norms = codes.square().sum(dim=-1)
    radius2 = float(norms.mean())
    if radius2 == 0:
        return 1.0, 1.0
    nearest = []
    for part in codes[:: max(1, len(codes) // _MEASURED_CODES)].split(1024):
        squared = (part.square().sum(dim=-1, keepdim=True) + norms - 2 * part @ codes.T).clamp_(min=0)
        nearest.append(squared.masked_fill_(squared <= 1e-12 * radius2, math.inf).amin(dim=-1))
    return math.sqrt(radius2), float(torch.cat(nearest).median().sqrt())


class NoiseMap:
    """The map for one codebook, whose scales are measured once.

    Args:
        codebook: code vectors (V, C); for LlamaGen the unit vectors of the image tokenizer.
        steps: evaluations of the posterior, at least 2; rows between two codes take a few more.
        method: "multistep", "euler" (steps uniform in t), or "rk4" (dense, float64, four evaluations a step: a
            reference; give it hundreds of steps).
        sigma_max, sigma_min: ends of the grid; by default 5 radii of the codebook and 0.15 of its spacing, for "rk4"
            100 radii and 1e-4 of the spacing. "euler" has no such grid and refuses them.
        block: codes treated at a time.

    Raises:
        StudioError: for values outside these ranges and a codebook that is no table of vectors.
    """

    def __init__(
        self,
        codebook: torch.Tensor,
        steps: int = 24,
        *,
        method: str = "multistep",
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        block: int = BLOCK,
    ) -> None:
        if codebook.ndim != 2 or not codebook.is_floating_point():
            raise StudioError(f"The codebook must be a table (V, C) of code vectors, not {tuple(codebook.shape)}.")
        if method not in METHODS:
            raise StudioError(f"The method is one of {', '.join(METHODS)}, not {shown(method)}.")
        steps = check_integer("steps", steps, 2, MAX_STEPS)
        if method == "euler" and not sigma_max is sigma_min is None:
            raise StudioError("euler steps in t from 0 to 1: leave out sigma_max and sigma_min.")
        self.steps, self.method, self.block = steps, method, block
        self.dtype = torch.float64 if method == "rk4" or codebook.dtype == torch.float64 else torch.float32
        codes = codebook.detach().to(self.dtype)
        self.codebook = codes - codes.mean(dim=0)
        if method == "euler":
            return
        radius, spacing = codebook_scales(codebook)
        first, last = (100 * radius, _FLOOR * spacing) if method == "rk4" else (5 * radius, 0.15 * spacing)
        first, last = first if sigma_max is None else sigma_max, last if sigma_min is None else sigma_min
        if not 0 < last < first < math.inf:
            raise StudioError(f"sigma must fall from sigma_max to sigma_min above 0, not from {first} to {last}.")
        self.sigmas, self.floor = log_spaced(first, last, steps), _FLOOR * spacing

    def __call__(self, noise: torch.Tensor, probs: torch.Tensor, support: int | None = None) -> torch.Tensor:
        """Tokens (B,), int64, for standard Gaussian noise (B, C) and probabilities (B, V).

        With `support`, at most so many codes of a row are possible (top-k), and only these are looked at; others that
        were possible all the same never come out.

        Rows of probabilities are scaled to sum 1; that none is negative or empty is not checked. A token of probability
        0 never comes out. A row's token does not depend on the other rows.
        """
        codes, width = self.codebook.shape
        if noise.shape != (len(probs), width) or probs.shape != (len(noise), codes):
            raise StudioError(
                f"The map takes noise (B, {width}) and probabilities (B, {codes}), "
                f"not {tuple(noise.shape)} and {tuple(probs.shape)}."
            )
        noise, probs = noise.to(self.dtype), probs.to(self.dtype)
        if support is not None and support * _SPARSE <= codes:
            probs, indices = probs.topk(support, dim=-1)
            log_probs = (probs / probs.sum(dim=-1, keepdim=True)).log()
            flow: Flow = SupportFlow(log_probs, self.codebook[indices], indices)
        else:
            flow = Flow((probs / probs.sum(dim=-1, keepdim=True)).log(), self.codebook, self.block)
        if self.method == "euler":
            return _picked(euler(flow, noise, self.steps)[0])
        if self.method == "rk4":
            return _picked(rk4(flow, noise, self.sigmas)[0])
        return multistep(flow, noise, self.sigmas, self.floor)


@torch.no_grad()
def noise_to_token(
    noise: torch.Tensor, probs: torch.Tensor, codebook: torch.Tensor, steps: int = 24, **settings: Any
) -> torch.Tensor:
    """Tokens (B,) with the distribution `probs` (B, V), as a deterministic function of Gaussian noise (B, C).

    One call of a `NoiseMap`, which takes the same settings; keep a `NoiseMap` where the codebook stays the same, since
    measuring the codebook costs up to 2048 V distances.
    """
    return NoiseMap(codebook, steps, **settings)(noise, probs)
