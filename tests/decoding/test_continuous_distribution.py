"""Whether continuous speculative sampling keeps the target's distribution: eleven tests, each with a control that must
fail.

One procedure is tested throughout, `verify_path`: on chains of Gaussian kernels whose distribution is known, and on a
pair of tiny models. Unless a test says otherwise, samples have 20000 rows, seeds are the numbers in the tests, and the
level is 1e-3 (Kolmogorov-Smirnov, chi-square) or 1 in 501 (permutation tests). No seed that fails is replaced by
another.
"""

import math

import pytest
import torch

from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.cspd import AlignedAcceptance, ContinuousSpeculative, FinalStep, continuous_speculative
from studio.decoding.denoising import denoise
from studio.decoding.mar import MaskedAutoregressive, masked_autoregressive
from studio.decoding.speculative_diffusion import log_density, trace, verify_path
from studio.reference.cspd import AuthorsAcceptance
from tests.decoding.distribution_tests import (
    LEVEL,
    cell_excess,
    energy_excess,
    ks_excess,
    mmd_excess,
    moments_fit,
    normal_cdf,
)
from tests.decoding.tiny_mar import tiny_mar

COUNT = 20000


class Chain:
    """Reverse kernels by step, functions (x, given) -> (mean, std); `given` has a row for each token."""

    def __init__(self, *kernels, given=None):
        self.kernels, self.steps, self.given = kernels, len(kernels), given

    def at(self, x, step):
        mean, std = self.kernels[step](x, None if self.given is None else self.given[: len(x)])
        return mean, torch.as_tensor(std).log().expand_as(mean)

    def along(self, states, first):
        parts = [self.at(x, first + number) for number, x in enumerate(states)]
        return tuple(torch.stack(part) for part in zip(*parts))

    def take(self, rows):
        return Chain(*self.kernels, given=None if self.given is None else self.given[rows])


def stay(x, given):
    """A last step that returns the state."""
    return x, 1.0


def gaussian(mean, std):
    """A distribution as a chain: one step that samples it, one that keeps it."""
    return Chain(stay, lambda x, given: (torch.zeros_like(x) + mean, std))


def noise_of(count, dim, seed):
    images = torch.arange(count)
    return TokenIndex(images, torch.zeros_like(images)), PositionNoise(images + 10**9 * (seed + 1), dim)


def speculate(p, q, seed, count=COUNT, dim=1):
    """Samples from q, verified for p; the verified and the drafts."""
    places, noise = noise_of(count, dim, seed)
    path = trace(q, noise.start(places), noise.steps(places, q.steps))
    return verify_path(path, p, places, noise), path


def relaxed(p, q, seed, inner_temperature, count=COUNT):
    """The authors' acceptance of samples from q's last noisy step."""
    places, noise = noise_of(count, 1, seed)
    drafts = trace(q, noise.start(places), noise.steps(places, 2)).states[0]
    ends = [
        FinalStep(*(torch.full_like(drafts, value) for value in (*distribution, 0.0))) for distribution in (p, q_of(q))
    ]
    authors = AuthorsAcceptance(inner_temperature, 100)
    accepted = authors.log_ratio(drafts, *ends) > noise.test(places).double().log()
    resampled = AlignedAcceptance(inner_temperature, 100).resample(*ends, places, noise, torch.arange(count)).tokens
    return torch.where(accepted[:, None], drafts, resampled)[:, 0], accepted


def q_of(chain):
    mean, log_std = chain.at(torch.zeros(1, 1), 1)
    return float(mean), float(log_std.exp())


def shared_mass(p, q):
    """The integral of min(p, q) of two Gaussians (mean, std)."""
    x = torch.linspace(-30, 30, 2_000_001, dtype=torch.float64)
    densities = [torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi)) for mean, std in (p, q)]
    return float(torch.minimum(*densities).sum() * (x[1] - x[0]))


def test_01_shifted_gaussians():
    verified, _ = speculate(gaussian(1.0, 1.0), gaussian(0.0, 1.0), seed=1)
    sampled = verified.tokens[:, 0]
    assert abs(float(verified.accepted.float().mean()) - 0.6171) < 4 * 0.0034
    assert ks_excess(sampled, normal_cdf(1, 1)) < 0
    assert ks_excess(sampled, normal_cdf(0, 1)) > 0
    flattened, accepted = relaxed((1.0, 1.0), gaussian(0.0, 1.0), seed=1, inner_temperature=42.0)
    assert float(accepted.float().mean()) > 0.99
    assert ks_excess(flattened, normal_cdf(1, 1)) > 0, "an inner temperature of 42 must be seen"


@pytest.mark.parametrize(("p", "q"), [((0.0, 0.5), (0.3, 1.0)), ((0.3, 1.0), (0.0, 0.5))], ids=["narrow", "wide"])
def test_02_other_widths(p, q):
    verified, path = speculate(gaussian(*p), gaussian(*q), seed=2)
    expected = shared_mass(p, q)
    error = math.sqrt(expected * (1 - expected) / COUNT)
    assert abs(float(verified.accepted.float().mean()) - expected) < 4 * error
    assert ks_excess(verified.tokens[:, 0], normal_cdf(*p)) < 0
    assert ks_excess(path.means[0, :, 0], normal_cdf(*p)) > 0, "drafts alone must be seen"


def test_03_equal_distributions():
    verified, path = speculate(gaussian(0.5, 0.7), gaussian(0.5, 0.7), seed=3)
    assert verified.accepted.all() and verified.trials == 0
    assert torch.equal(verified.tokens, path.means[0])
    assert not speculate(gaussian(0.5, 0.7), gaussian(0.6, 0.7), seed=3)[0].accepted.all()


@pytest.mark.parametrize("distance", [0.01, 0.02])
def test_04_close_distributions(distance):
    verified, _ = speculate(gaussian(distance, 1.0), gaussian(0.0, 1.0), seed=4)
    sampled = verified.tokens[:, 0]
    assert sampled.isfinite().all() and (sampled != 0).all() and len(sampled.unique()) > COUNT - 50
    assert verified.trials < 3 * COUNT
    assert ks_excess(sampled, normal_cdf(distance, 1)) < 0
    places, noise = noise_of(2000, 1, 4)
    ends = [FinalStep(*(torch.full((2000, 1), value) for value in (mean, 1.0, 0.0))) for mean in (distance, 0.0)]
    tokens, _, _ = AuthorsAcceptance(1.0, 100).resample_all(*ends, places, noise)
    assert (tokens == 0).any(), "the authors' zeros must be seen"


def test_05_disjoint_distributions():
    verified, path = speculate(gaussian(12.0, 1.0), gaussian(0.0, 1.0), seed=5)
    assert float(verified.accepted.float().mean()) < 1e-3
    assert ks_excess(verified.tokens[:, 0], normal_cdf(12, 1)) < 0
    assert ks_excess(path.means[0, :, 0], normal_cdf(12, 1)) > 0


def mixture(x, given):
    """From x ~ N(0, I): 0.4 N((-2, 0), I) + 0.6 N((2, 1), [[1, 0.6], [0.6, 1]]), when the noise is added."""
    second = torch.special.ndtr(x[:, :1].double()) > 0.4
    shared = 0.6**0.5 * x[:, 1:]
    mean = torch.where(second, torch.tensor([2.0, 1.0]) + shared, torch.tensor([-2.0, 0.0]))
    return mean, torch.where(second, 0.4**0.5, 1.0)


def test_06_mixture_from_a_wide_draft():
    p, q = Chain(stay, mixture), gaussian(0.0, 3.0)
    verified, path = speculate(p, q, seed=6, dim=2)
    generator = torch.Generator().manual_seed(6)
    start, normal = (torch.randn(400_000, 2, generator=generator) for _ in range(2))
    mean, std = mixture(start, None)
    exact = mean + std * normal
    assert cell_excess(verified.tokens, exact) < 0 and cell_excess(path.means[0], exact) > 0
    mean = 0.4 * torch.tensor([-2.0, 0.0]) + 0.6 * torch.tensor([2.0, 1.0])
    apart = torch.tensor([4.0, 1.0], dtype=torch.float64)
    covariance = torch.eye(2, dtype=torch.float64) + 0.24 * torch.outer(apart, apart)
    covariance[0, 1], covariance[1, 0] = covariance[0, 1] + 0.36, covariance[1, 0] + 0.36
    assert moments_fit(verified.tokens, mean, covariance) and not moments_fit(path.means[0], mean, covariance)
    assert mmd_excess(verified.tokens[:2000], exact[:2000]) < 0
    assert mmd_excess(path.means[0][:2000], exact[:2000]) > 0


@pytest.mark.parametrize("dim", [16, 64])
def test_07_narrow_distributions_of_many_numbers(dim):
    generator = torch.Generator().manual_seed(7)
    p_mean = torch.randn(dim, generator=generator)
    q_mean, p_std = p_mean + 0.001 * torch.randn(dim, generator=generator), torch.full((dim,), 0.006)
    q_std = p_std * (1 + 0.05 * torch.randn(dim, generator=generator))
    verified, path = speculate(gaussian(p_mean, p_std), gaussian(q_mean, q_std), seed=7, dim=dim)
    assert 0.05 < float(verified.accepted.float().mean()) < 0.95
    x = path.states[0]
    ours = log_density(x, p_mean, p_std.log()) - log_density(x, q_mean, q_std.log())
    exact = sum(
        sign * torch.distributions.Normal(mean.double(), std.double()).log_prob(x.double()).sum(dim=1)
        for sign, mean, std in ((1, p_mean, p_std), (-1, q_mean, q_std))
    )
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-5)
    directions = torch.nn.functional.normalize(torch.randn(20, dim, generator=generator), dim=1)
    failed = 0
    for direction in directions:
        cdf = normal_cdf(float(p_mean @ direction), float((p_std * direction).norm()))
        assert ks_excess(verified.tokens @ direction, cdf, LEVEL / 20) < 0
        failed += ks_excess(path.means[0] @ direction, cdf, LEVEL / 20) > 0
    assert failed > 0, "drafts alone must be seen"


def linear(scale, shift, std):
    return lambda x, given: (scale * x + shift, std)


P = ((0.9, 0.05, 0.5), (0.8, 0.3, 0.3), (0.7, -0.2, 0.5), (0.9, 0.1, 0.8), (0.6, 0.4, 1.0))
Q = ((0.95, 0.0, 0.6), (0.7, 0.2, 0.35), (0.75, -0.1, 0.45), (0.8, 0.2, 0.9), (0.5, 0.3, 1.1))


def distribution_of_chain(kernels):
    """Mean and standard deviation of the token from x_T ~ N(0, 1); the last step, the first kernel, has no noise."""
    mean, variance = 0.0, 1.0
    for step in reversed(range(len(kernels))):
        scale, shift, std = kernels[step]
        mean, variance = scale * mean + shift, scale**2 * variance + (std**2 if step else 0.0)
    return mean, math.sqrt(variance)


def test_08_chain():
    p, q = (Chain(*(linear(*kernel) for kernel in kernels)) for kernels in (P, Q))
    verified, _ = speculate(p, q, seed=8)
    assert 0.1 < float(verified.accepted.float().mean()) < 0.9
    assert ks_excess(verified.tokens[:, 0], normal_cdf(*distribution_of_chain(P))) < 0
    places, noise = noise_of(COUNT, 1, 8)
    ends = [
        FinalStep.of(denoise(chain, noise.start(places), noise.steps(places, chain.steps)), 1.0) for chain in (p, q)
    ]
    for rule in (AlignedAcceptance(1.0, 100), AuthorsAcceptance(1.0, 100)):
        accepted = rule.log_ratio(ends[1].mean, *ends) > noise.test(places).double().log()
        resampled = rule.resample(*ends, places, noise, torch.arange(COUNT)).tokens
        tokens = torch.where(accepted[:, None], ends[1].mean, resampled)[:, 0]
        assert ks_excess(tokens, normal_cdf(*distribution_of_chain(P))) > 0, "the relaxed scheme must be seen"


def test_09_prefix():
    """2000 rows of two positions, the second conditioned on the first."""
    count = 2000

    def second(scale, std, given):
        return Chain(stay, lambda x, first: (scale * first, std), given=given)

    first, path = speculate(gaussian(0.0, 1.0), gaussian(0.8, 1.0), seed=9, count=count)
    joint = {}
    for name, given in (("kept prefix", first.tokens), ("no roll-back", path.means[0])):
        verified, _ = speculate(second(0.9, 0.3, given), second(0.5, 0.5, given), seed=10, count=count)
        joint[name] = torch.cat((first.tokens, verified.tokens), dim=1)
    generator = torch.Generator().manual_seed(9)
    x, normal = (torch.randn(count, 1, generator=generator) for _ in range(2))
    exact = torch.cat((x, 0.9 * x + 0.3 * normal), dim=1)
    assert energy_excess(joint["kept prefix"], exact) < 0
    assert energy_excess(joint["no roll-back"], exact) > 0, "a second position judged by a rejected first must be seen"


def test_10_rows_do_not_depend_on_each_other():
    p, q = (Chain(*(linear(*kernel) for kernel in kernels)) for kernels in (P, Q))
    places, noise = noise_of(200, 3, 10)
    rows = torch.arange(0, 200, 7)

    def verified(places):
        path = trace(q, noise.start(places), noise.steps(places, q.steps))
        return verify_path(path, p, places, noise)

    everyone, some = verified(places), verified(places.take(rows))
    assert not everyone.accepted.all()
    torch.testing.assert_close(some.tokens, everyone.tokens[rows], atol=1e-6, rtol=0)
    others = verified(TokenIndex(places.images[rows] + 1, places.positions[rows]))
    assert not torch.equal(others.tokens, some.tokens), "other images have other numbers"


@pytest.mark.slow
def test_11_models():
    """4000 images of one class, of 4 tokens of 2 numbers, in 3 steps of 4 denoising steps, guided."""
    count, sizes = 4000, {"steps": 3, "diffusion_steps": 4}
    target, draft = (tiny_mar(seed, grid_size=2, token_dim=2, width=16) for seed in (0, 1))
    condition = {"class_labels": torch.zeros(count, dtype=torch.long)}

    def noise(first):
        return PositionNoise(torch.arange(count) + first, 2)

    def plain(model, first):
        settings = MaskedAutoregressive(**sizes)
        return masked_autoregressive(
            model, condition, guidance_scale=2.0, settings=settings, noise=noise(first)
        ).tokens.flatten(1)

    exact, control = plain(target, 10**9), plain(draft, 2 * 10**9)
    sampled = continuous_speculative(
        target,
        condition,
        draft=draft,
        guidance_scale=2.0,
        settings=ContinuousSpeculative(prefill=0.0, **sizes),
        noise=noise(3 * 10**9),
    )
    assert 0.02 < sampled.acceptance < 0.98
    speculated = sampled.tokens.flatten(1)
    assert same_moments(speculated, exact) and not same_moments(control, exact)
    assert mmd_excess(speculated[:2000], exact[:2000]) < 0
    assert mmd_excess(control[:2000], exact[:2000]) > 0, "drafts alone must be seen"


def same_moments(x, y, bound=4.5):
    """Whether means, and covariances about the mean of y, agree within `bound` standard errors."""
    x, y = x.double(), y.double()
    centre = y.mean(dim=0)
    pairs = [(x, y)]
    pairs.append(tuple(((part - centre)[:, :, None] * (part - centre)[:, None, :]).flatten(1) for part in (x, y)))
    for first, second in pairs:
        error = ((first.var(dim=0) + second.var(dim=0)) / len(first)).sqrt()
        if not ((first.mean(dim=0) - second.mean(dim=0)).abs() < bound * error).all():
            return False
    return True
