"""Continuous speculative decoding by its authors' code (arXiv:2411.11925), for their published numbers.

It differs from `studio.decoding.cspd` in four ways: the ratio of widths has the other sign; all tokens of a block are
sampled anew until each was accepted once, and of those the rejected ones are replaced; one that no trial accepts
becomes zeros; the target judges a block with the guidance of its last step. Only the sums of logs in float64 are ours.
"""

from dataclasses import dataclass

import torch

from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.cspd import AlignedAcceptance, ContinuousSpeculative, FinalStep, Resampled
from studio.errors import StudioError


@dataclass(frozen=True)
class AuthorsAcceptance(AlignedAcceptance):
    """As of `AlignedAcceptance`, by the authors' rule."""

    keeps_scales = False

    def log_width_ratio(self, target: FinalStep, draft: FinalStep) -> torch.Tensor:
        """With the authors' sign."""
        return -super().log_width_ratio(target, draft)

    def resample(
        self, target: FinalStep, draft: FinalStep, places: TokenIndex, noise: PositionNoise, rejected: torch.Tensor
    ) -> Resampled:
        """Of trials for all n tokens, also those whose draft was accepted, what replaces the rejected ones."""
        tokens, rounds, accepted = self.resample_all(target, draft, places, noise)
        return Resampled(tokens[rejected], rounds, ~accepted[rejected])

    def resample_all(
        self, target: FinalStep, draft: FinalStep, places: TokenIndex, noise: PositionNoise
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Tokens (n, D) after rounds of trials until each was accepted once, the rounds, and which (n,) ever were."""
        tokens, rounds = torch.zeros_like(target.mean), 0
        accepted = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        while not accepted.all() and rounds < self.max_rounds:
            normal, uniform = noise.trial(places, rounds)
            trial = target.mean + target.std * normal
            passed = uniform < self.trial_chance(trial, target, draft)
            tokens[passed] = trial[passed]
            accepted, rounds = accepted | passed, rounds + 1
        return tokens, rounds, accepted


@dataclass(frozen=True, kw_only=True)
class AuthorsContinuousSpeculative(ContinuousSpeculative):
    """`ContinuousSpeculative` in "relaxed" mode by the authors' rule."""

    mode: str = "relaxed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "relaxed":
            raise StudioError('The authors\' rule is for mode="relaxed": use ContinuousSpeculative for exact decoding.')

    @property
    def acceptance(self) -> AuthorsAcceptance:
        """The authors' tests."""
        assert self.inner_temperature is not None and self.max_rounds is not None
        return AuthorsAcceptance(self.inner_temperature, self.max_rounds)
