"""A mixture of Gaussians over code vectors, whose means share a low-rank projection.

The likelihood of ResGen (arXiv:2412.10208): p(z) = sum_k pi_k N(z; mu_k, sigma^2 I). Its variational form, where the
responsibility of a component is proportional to its density alone, is that of CLaM-TTS (arXiv:2404.02781). The
parametrisation of the means is ours, since none is published: mu_k = s_k P + b_k with scores s_k in R^R from the
network and learned P and b_k. Distances to all means are computed from the scores, without a (..., K, C) tensor.
"""

import math
from typing import NamedTuple

import torch
from torch import nn


class Mixture(NamedTuple):
    """Prediction for each position: logits (..., K) of the components, and the scores (..., K, R) of their means."""

    logits: torch.Tensor
    scores: torch.Tensor


class GaussianMixture(nn.Module):
    """Predicts mixtures from states, and evaluates vectors under mixtures.

    Args:
        dim: width of a state.
        code_dim: length C of a code vector.
        components: number K of Gaussians.
        rank: scores R of a mean.
        sigma: standard deviation of each coordinate around a mean; that of the quantiser's last residual works best.
        learn_sigma: whether it is trained.
    """

    def __init__(self, dim: int, code_dim: int, components: int, rank: int, sigma: float, learn_sigma: bool):
        super().__init__()
        self.components, self.rank = components, rank
        self.linear = nn.Linear(dim, components * (1 + rank))
        self.projection = nn.Parameter(torch.randn(rank, code_dim) / rank**0.5)
        self.offsets = nn.Parameter(torch.randn(components, code_dim) / code_dim**0.5)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=learn_sigma)

    @property
    def sigma(self) -> torch.Tensor:
        """Standard deviation of each coordinate around a mean, a scalar."""
        return self.log_sigma.exp()

    def forward(self, states: torch.Tensor) -> Mixture:
        """The mixture, float32, of each state (..., dim)."""
        logits, scores = self.linear(states).float().split((self.components, self.components * self.rank), dim=-1)
        return Mixture(logits, scores.unflatten(-1, (self.components, self.rank)))

    def mean(self, mixture: Mixture, component: torch.Tensor) -> torch.Tensor:
        """The mean (..., C) of one component (...,) of each mixture."""
        index = component[..., None, None].expand(*component.shape, 1, self.rank)
        scores = mixture.scores.gather(-2, index)[..., 0, :]
        return scores @ self.projection.float() + self.offsets.float()[component]

    def squared_distances(self, mixture: Mixture, vectors: torch.Tensor) -> torch.Tensor:
        """|z - mu_k|^2 (..., K) of vectors z (..., C) to all means of their mixtures.

        In float32 even under autocast, because they are small differences of large products.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            return self._squared_distances(mixture, vectors)

    def _squared_distances(self, mixture: Mixture, vectors: torch.Tensor) -> torch.Tensor:
        vectors, scores = vectors.float(), mixture.scores
        projection, offsets = self.projection.float(), self.offsets.float()
        from_offsets = vectors.square().sum(-1, keepdim=True) - 2 * vectors @ offsets.T + offsets.square().sum(-1)
        along = (scores @ (vectors @ projection.T)[..., None])[..., 0]
        of_means = (scores * (scores @ (projection @ projection.T) + 2 * offsets @ projection.T)).sum(dim=-1)
        return from_offsets + of_means - 2 * along

    def log_likelihood(self, mixture: Mixture, vectors: torch.Tensor) -> torch.Tensor:
        """log p(z) (...,) of vectors z (..., C)."""
        exponents = mixture.logits.log_softmax(dim=-1) - self._energies(mixture, vectors)
        return exponents.logsumexp(dim=-1) - self._log_normaliser(vectors)

    def variational_loss(self, mixture: Mixture, vectors: torch.Tensor) -> torch.Tensor:
        """An upper bound (...,) on -log p(z), which keeps every component in use; the gap is at least the entropy of q.

        sum_k q_k (|z - mu_k|^2 / (2 sigma^2) - log pi_k) + log-normaliser, with the constant
        q_k proportional to exp(-|z - mu_k|^2 / (2 sigma^2)).
        """
        energies = self._energies(mixture, vectors)
        responsibilities = (-energies).softmax(dim=-1).detach()
        costs = energies - mixture.logits.log_softmax(dim=-1)
        return (responsibilities * costs).sum(dim=-1) + self._log_normaliser(vectors)

    def _energies(self, mixture: Mixture, vectors: torch.Tensor) -> torch.Tensor:
        return self.squared_distances(mixture, vectors) / (2 * self.sigma.float().square())

    def _log_normaliser(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.shape[-1] * (self.log_sigma.float() + math.log(2 * math.pi) / 2)
