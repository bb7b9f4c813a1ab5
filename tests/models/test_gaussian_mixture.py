"""The low-rank mixture against the plain formula, and its bound."""

import math

import pytest
import torch

from studio.models.gaussian_mixture import GaussianMixture


@pytest.fixture
def case():
    torch.manual_seed(0)
    head = GaussianMixture(dim=6, code_dim=5, components=4, rank=2, sigma=0.7, learn_sigma=False)
    mixture = head(torch.randn(3, 8, 6))
    return head, mixture, torch.randn(3, 8, 5)


def dense_means(head, mixture):
    return mixture.scores @ head.projection + head.offsets


def test_distances_and_means(case):
    head, mixture, z = case
    means = dense_means(head, mixture)
    expected = (z[..., None, :] - means).square().sum(dim=-1)
    torch.testing.assert_close(head.squared_distances(mixture, z), expected, atol=1e-4, rtol=1e-4)
    picked = torch.randint(4, (3, 8))
    expected = means.gather(2, picked[..., None, None].expand(3, 8, 1, 5))[:, :, 0]
    torch.testing.assert_close(head.mean(mixture, picked), expected)


def test_distances_are_exact_under_autocast(case):
    head, mixture, z = case
    far = head.squared_distances(mixture, z + 100)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head.squared_distances(mixture, z + 100), far)


def test_likelihood_is_that_of_torch(case):
    head, mixture, z = case
    normal = torch.distributions.Normal(dense_means(head, mixture), head.sigma)
    distribution = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.logits), torch.distributions.Independent(normal, 1)
    )
    torch.testing.assert_close(head.log_likelihood(mixture, z), distribution.log_prob(z), atol=1e-4, rtol=1e-4)


def test_the_variational_loss_is_a_bound(case):
    head, mixture, z = case
    energies = head.squared_distances(mixture, z) / (2 * 0.7**2)
    q = (-energies).softmax(dim=-1)
    entropy = -(q * q.log()).sum(dim=-1)
    loss, exact = head.variational_loss(mixture, z), -head.log_likelihood(mixture, z)
    assert (exact <= loss - entropy + 1e-4).all()
    one = GaussianMixture(dim=6, code_dim=5, components=1, rank=2, sigma=0.7, learn_sigma=True)
    mixture = one(torch.randn(3, 8, 6))
    torch.testing.assert_close(one.variational_loss(mixture, z), -one.log_likelihood(mixture, z))
    constant = 5 * (math.log(0.7) + math.log(2 * math.pi) / 2)
    torch.testing.assert_close(
        one.variational_loss(mixture, z) - constant, one.squared_distances(mixture, z)[..., 0] / (2 * 0.7**2)
    )


@pytest.mark.parametrize("learn", [False, True])
def test_sigma_is_trained_when_asked(learn):
    head = GaussianMixture(dim=6, code_dim=5, components=4, rank=2, sigma=0.7, learn_sigma=learn)
    head.variational_loss(head(torch.randn(2, 6)), torch.randn(2, 5)).sum().backward()
    assert (head.log_sigma.grad is not None) == learn
