"""Acceptance of continuous speculative decoding: draft and target denoise a token with the same noise, and the ends of
the two paths are compared.

"Continuous Speculative Decoding for Autoregressive Image Generation" (arXiv:2411.11925), sections 3.2 to 3.4. With one
noise the exponents of the steps before the last are taken to cancel; a ratio of their widths remains, beside the two
densities of the last step, whose exponents an inner temperature flattens.

The result is approximate: tokens do not follow the target's law, even without an inner temperature. `path_verification`
is the exact scheme.

Deviations from the authors' code, all but the first undone by `reference=True`: sums of logs in float64, where
products of small widths underflow; the ratio of widths has the sign of a density ratio; only rejected tokens are drawn
anew, each once; one that no trial accepts is drawn from the target, where the authors leave zeros.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from studio.decoding.path_verification import log_density
from studio.decoding.position_noise import Places, PositionNoise


@dataclass
class Ends:
    """The ends of n paths.

    Args:
        mean, std: of the last step, (n, D), with temperature.
        widths: logs of the standard deviations of all steps before, summed, (n, D), without temperature.
    """

    mean: torch.Tensor
    std: torch.Tensor
    widths: torch.Tensor

    @classmethod
    def of(cls, steps: Iterable, temperature: float) -> "Ends":
        """Those of the steps that `descend` yields."""
        widths, ended = 0.0, None
        for step, _, mean, log_std in steps:
            if step:
                widths = widths + log_std
            else:
                ended = cls(mean, temperature * log_std.exp(), widths + torch.zeros_like(mean))
        return ended

    def take(self, rows) -> "Ends":
        """Those of some of the paths."""
        return Ends(self.mean[rows], self.std[rows], self.widths[rows])


@dataclass
class Redrawn:
    """Tokens (n, D) in place of rejected ones, rounds of trials, and which tokens (n,) no trial accepted."""

    tokens: torch.Tensor
    rounds: int
    fallbacks: torch.Tensor


def log_width_ratio(target: Ends, draft: Ends, reference: bool = False) -> torch.Tensor:
    """Log (n,), float64, of what the widths of the steps before the last make of the ratio of paths."""
    ratio = (draft.widths.double() - target.widths.double()).sum(dim=1)
    return -ratio if reference else ratio


def log_ratio(
    x: torch.Tensor, target: Ends, draft: Ends, inner_temperature: float, reference: bool = False
) -> torch.Tensor:
    """Log ratio (n,), float64; the draft x (n, D) is accepted if it exceeds the log of a uniform number."""
    ratio = log_width_ratio(target, draft, reference)
    for ends, sign in ((target, 1), (draft, -1)):
        std = ends.std.double()
        exponent = ((x.double() - ends.mean.double()) / (std * inner_temperature)).square() / 2
        ratio = ratio - sign * (exponent + std.log()).sum(dim=1)
    return ratio


def trial_chance(x: torch.Tensor, target: Ends, draft: Ends, reference: bool = False) -> torch.Tensor:
    """The chance (n,), float64, that a trial x (n, D), drawn from the target's last step, is accepted."""
    theirs, drafts = (log_density(x, ends.mean, ends.std.double().log()) for ends in (target, draft))
    excess = drafts - theirs - log_width_ratio(target, draft, reference)
    return -torch.expm1(excess.clamp(max=0))


def redraw(target: Ends, draft: Ends, places: Places, noise: PositionNoise, max_rounds: int) -> Redrawn:
    """Draws for rejected tokens: trials from the target's last step, at most `max_rounds` for each."""
    tokens, pending, rounds = target.mean.clone(), torch.arange(len(target.mean), device=target.mean.device), 0
    fallbacks = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    while len(pending) and rounds < max_rounds:
        theirs, drafts = target.take(pending), draft.take(pending)
        normal, uniform = noise.trial(places.take(pending), rounds)
        trial = theirs.mean + theirs.std * normal
        passed = uniform < trial_chance(trial, theirs, drafts)
        tokens[pending[passed]] = trial[passed]
        pending, rounds = pending[~passed], rounds + 1
    normal, _ = noise.trial(places.take(pending), max_rounds)
    tokens[pending] = target.mean[pending] + target.std[pending] * normal
    fallbacks[pending] = True
    return Redrawn(tokens, rounds, fallbacks)


def redraw_reference(target: Ends, draft: Ends, places: Places, noise: PositionNoise, max_rounds: int) -> Redrawn:
    """As the authors do it, for all tokens of a block: rounds until each was accepted once; later ones count.

    That includes tokens whose draft was accepted, which are never replaced: of the fallbacks, those are none.
    """
    tokens, rounds = torch.zeros_like(target.mean), 0
    accepted = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    while not accepted.all() and rounds < max_rounds:
        normal, uniform = noise.trial(places, rounds)
        trial = target.mean + target.std * normal
        passed = uniform < trial_chance(trial, target, draft, reference=True)
        tokens[passed] = trial[passed]
        accepted, rounds = accepted | passed, rounds + 1
    return Redrawn(tokens, rounds, ~accepted)
