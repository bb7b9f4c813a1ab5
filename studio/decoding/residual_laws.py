"""What ResGen (arXiv:2412.10208) says of the hidden levels of a picture, as a law that codes are drawn from and that
says how sure it is of them: a mixture over their sum, or, in the ablation, a softmax for each level.
"""

from abc import ABC, abstractmethod

import torch

from studio.decoding.residual_masks import shown
from studio.decoding.sampling import Sampling, exponential_noise, sample_rows
from studio.errors import StudioError


class ResidualLaw(ABC):
    """The law of one call.

    Args:
        head: that of the network.
        said: what the head gave for every cell.
        quantizer: the tokenizer's.

    Attributes:
        has_spread: whether there is one that `scatter` multiplies.
    """

    has_spread: bool

    def __init__(self, head, said, quantizer):
        self.head, self.said, self.quantizer = head, said, quantizer

    @classmethod
    def check(cls, scatter: float) -> None:
        """Raises a `StudioError` for a `scatter` that would change nothing."""
        if scatter != 1 and not cls.has_spread:
            raise StudioError("This model has a softmax for every level and no spread: leave out scatter.")

    @abstractmethod
    def draw(
        self, hidden: torch.Tensor, sampling: Sampling, scatter: float, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Codes (B, L, D) of all hidden levels, of which each cell has `hidden` (B, L); -1 in the others."""

    @abstractmethod
    def level_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        """What each code (B, L, D) adds to the log-likelihood of its cell (B, L, D), in order; -1 adds nothing."""

    @abstractmethod
    def cell_confidence(self, codes: torch.Tensor) -> torch.Tensor:
        """The log-likelihood of the codes (B, L, D) of a cell together, the same (B, L, D) for each of them."""


class MixtureLaw(ResidualLaw):
    """A component is drawn and a vector around its mean, which is quantised from the first hidden level on."""

    has_spread = True

    def draw(self, hidden, sampling, scatter, generators):
        sums = self.head.mean(self.said, _draw(self.said.logits, sampling, generators))
        if spread := scatter * sampling.temperature:
            sums = sums + spread * self.head.sigma * _normal_noise(sums, generators)
        return self.quantizer.encode(sums, first=self.quantizer.depth - hidden)

    def level_confidence(self, codes):
        partial = self.quantizer.lookup(codes).cumsum(dim=-2)
        points = (torch.zeros_like(partial[..., 0, :]), *partial.unbind(-2))
        return torch.stack([self.head.log_likelihood(self.said, point) for point in points], dim=-1).diff(dim=-1)

    def cell_confidence(self, codes):
        total = self.quantizer.lookup(codes).sum(dim=-2)
        return self.head.log_likelihood(self.said, total)[..., None].expand(codes.shape)


class LevelLaw(ResidualLaw):
    """Every level is drawn on its own."""

    has_spread = False

    def draw(self, hidden, sampling, scatter, generators):
        drawn = _draw(self.said.logits, sampling, generators)
        return torch.where(shown(hidden, self.quantizer.depth), -1, drawn)

    def level_confidence(self, codes):
        chosen = self.said.logits.log_softmax(dim=-1).gather(-1, codes.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(codes < 0, 0)

    def cell_confidence(self, codes):
        return self.level_confidence(codes).sum(dim=-1, keepdim=True).expand(codes.shape)


LAWS = {"mixture": MixtureLaw, "levels": LevelLaw}
"""By what the network predicts."""


def gumbel_noise(like: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard Gumbel noise in the shape of a tensor (B, ...), float32; that of row i by generators[i] alone."""
    noise = exponential_noise(len(like), like[0].numel(), generators, like.device)
    return -noise.log().view(like.shape)


def _draw(logits, sampling, generators):
    """Numbers (B, ...) out of logits (B, ..., V)."""
    if sampling.greedy:
        return logits.argmax(dim=-1)
    laws = sampling.probabilities(logits.flatten(0, -2))
    race = exponential_noise(len(logits), laws.numel() // len(logits), generators, laws.device)
    return sample_rows(laws, noise=race.view_as(laws)).view(logits.shape[:-1])


def _normal_noise(like, generators):
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device).to(like.device) for g in generators]
    return torch.stack(rows)
