"""How the guesses of Jacobi decoding are tested, and what is guessed next; `jacobi` says what the couplings are."""

from typing import TYPE_CHECKING

import torch

from studio.decoding.sampling import Sampling, fill_exponential

if TYPE_CHECKING:
    from studio.decoding.lantern import Relaxation

COUPLINGS = ("seed", "none", "maximal", "gumbel")


class Chance:
    """Fresh random numbers of one round in [0, 1), float64.

    Args:
        numbers: (B, 2n): an unused one, those of tests, then those of samples.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers, self._places = numbers, numbers.shape[1] // 2

    @property
    def tests(self) -> torch.Tensor:
        """(B, n - 1)."""
        return self.numbers[:, 1 : self._places]

    @property
    def samples(self) -> torch.Tensor:
        """(B, n)."""
        return self.numbers[:, self._places :]

    @classmethod
    def of(cls, generators: list[torch.Generator], places: int, device: torch.device | str) -> "Chance":
        """For windows of n places, of each image's generator alone."""
        each = [torch.rand(1, 2 * places, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        return cls((each[0] if len(each) == 1 else torch.cat(each)).to(device))

    def test(self, share: torch.Tensor, *masses: torch.Tensor) -> list[torch.Tensor]:
        """Which guesses pass, each with probability mass / share, for each of the masses by the same numbers."""
        return [self.tests * share < mass for mass in masses]

    def sample(self, weights: torch.Tensor) -> torch.Tensor:
        """Samples (B, n) of distributions (B, n, V), up to their sums: the inverse of the distribution function."""
        sums = weights.cumsum(dim=2, dtype=torch.float64)
        return torch.searchsorted(sums, (1 - self.samples[:, :, None]) * sums[:, :, -1:])[:, :, 0]


def decide(
    distributions: torch.Tensor,
    guesses: torch.Tensor,
    proposals: torch.Tensor,
    chance: Chance,
    coupling: str,
    relaxation: "Relaxation | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tests the guesses of B windows of n places, all places at once.

    Args:
        distributions: the model's distributions p (B, n, V) of the token at each place, after filters, given all
            guesses before.
        guesses: (B, n - 1), one for each place but the last.
        proposals: the distributions q (B, n - 1, V) that they were sampled from; one-hot for a guess without any.
        chance: fresh random numbers.
        coupling: "none", "maximal" or "gumbel".
        relaxation: what guesses may borrow in the tests that commit a token.

    Returns:
        Outcomes (B, n) and how many guesses pass before the first that fails, (B,). With r of these, outcomes 0 to r
        are tokens: the guesses that passed and, behind them, a sample of max(p - q, 0), or of p at the last place. The
        outcomes behind are the next guesses; with "gumbel", the caller's noise makes those.
    """
    p, steps = distributions[:, :-1], torch.arange(distributions.shape[1], device=distributions.device)
    own, share = (values.gather(2, guesses[:, :, None])[:, :, 0] for values in (p, proposals))
    held = own
    if relaxation is not None:
        flat = (values.flatten(0, 1) for values in (p, guesses, share))
        held = own + relaxation.borrowed_mass(*flat).view_as(own)
    passed, relaxed = chance.test(share, own, held)
    right = leading(relaxed)
    behind = steps[:-1] > right[:, None]
    kept, replaced = steps[:-1] < right[:, None], steps[:-1] == right[:, None]
    if coupling == "maximal":
        kept, replaced = kept | (behind & passed), replaced | (behind & ~passed)
    rest = (p - proposals).clamp(min=0)
    rest = torch.where(rest.sum(dim=2, keepdim=True) > 0, rest, p)
    weights = torch.cat((torch.where(replaced[:, :, None], rest, p), distributions[:, -1:]), dim=1)
    outcomes = chance.sample(weights)
    outcomes[:, :-1] = torch.where(kept, guesses, outcomes[:, :-1])
    return outcomes, right


def next_proposals(distributions: torch.Tensor, outcomes: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The distributions q (B, n - 1, V) of the guesses behind `right` + 1 new tokens, all of them this call's p.

    That is so for guesses that passed a test and for those that replaced others: as an outcome, both have the
    distribution p. Places beyond this window repeat its last outcome.
    """
    places, images = distributions.shape[1], torch.arange(len(distributions), device=distributions.device)[:, None]
    known = torch.cat((distributions, one_hot(outcomes[:, -1:], distributions)), dim=1)
    return known[images, (right[:, None] + 1 + torch.arange(places - 1, device=distributions.device)).clamp(max=places)]


class PositionRaces:
    """Exp(1) noise (V,) for each position of B images, as plain decoding takes it: in order, a row for a token.

    Args:
        slots: positions whose noise is kept at a time.
        total: positions of an image; the first one has had its noise already.
    """

    def __init__(
        self, generators: list[torch.Generator], vocab: int, slots: int, total: int, device: torch.device | str
    ) -> None:
        self.generators, self.slots, self.total = generators, slots, total
        self.noise, self.taken = torch.ones(len(generators) * slots, vocab, device=device), [1] * len(generators)

    def reach(self, numbers: list[int], ends: list[int]) -> None:
        """Takes the noise of all positions before `ends` of these images."""
        for number, end in zip(numbers, ends):
            for position in range(self.taken[number], min(end, self.total)):
                row = number * self.slots + position % self.slots
                fill_exponential(self.noise[row], self.generators[number])
                self.taken[number] = position + 1

    def winners(
        self, sampling: Sampling, logits: torch.Tensor, images: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Samples (b, n) for logits (b, n, V) of the tokens `index` (b, n) of these images."""
        rows = images[:, None] * self.slots + index % self.slots
        return sampling.winners(logits.flatten(0, 1), self.noise, rows.flatten()).view(index.shape)


def leading(passed: torch.Tensor) -> torch.Tensor:
    """How many numbers (B,) of each row (B, n) are true before the first that is not."""
    return passed.long().cumprod(dim=1).sum(dim=1)


def one_hot(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Distributions (B, n, V) of tokens (B, n) that are certain."""
    return like.new_zeros(*tokens.shape, like.shape[2]).scatter_(2, tokens[:, :, None], 1.0)
