"""Sampling is as random as it says: the race follows the probabilities, and its noise is not cut off.

Gumbel noise made of float32 uniforms ends at 16.6, which sharpens a distribution ("Masked Diffusion Models are Secretly
Time-Agnostic Masked Models", arXiv:2409.02908, section 4). The exponential race has no such end where the smallest
noise goes below 2^-24.
"""

import numpy as np
import pytest
import torch

from studio.decoding.sampling import exponential_noise, sample_rows

PROBABILITIES = np.array([0.5, 0.3, 0.15, 0.05])
SAMPLES, LIMIT = 400_000, 16.27
"""The limit of a chi-square of three degrees of freedom at level 0.001."""


def truncated(p: np.ndarray, end: float) -> np.ndarray:
    """The distribution of argmax(log p + G) for Gumbel noise G that is at most `end`, in closed form."""
    order = np.argsort(p)
    q, size, e = p[order], len(p), np.exp(-end)
    tails = np.cumsum(q[::-1])[::-1]
    terms = []
    for index, (own, before) in enumerate(zip(q, (0.0, *q[:-1]))):
        rest = size - index  # K + 1 - i with i from 1
        lower = np.exp((rest - tails[index] / before) * e) if before else 0.0
        terms.append((np.exp((rest - tails[index] / own) * e) - lower) / tails[index])
    found = np.empty(size)
    found[order] = q * np.cumsum(terms)
    return found


def chi_square(tokens, expected):
    counts = np.bincount(tokens.numpy(), minlength=len(expected))
    return float(((counts - SAMPLES * expected) ** 2 / (SAMPLES * expected)).sum())


def sampled(noise):
    return sample_rows(torch.tensor(PROBABILITIES, dtype=torch.float32).expand(SAMPLES, -1), noise=noise)


def test_the_closed_form_is_a_distribution_that_ends_in_the_whole_one():
    assert truncated(PROBABILITIES, 1.0).sum() == pytest.approx(1)
    assert truncated(PROBABILITIES, 40.0) == pytest.approx(PROBABILITIES, abs=1e-12)
    assert abs(truncated(PROBABILITIES, 16.6355) - PROBABILITIES).max() < 1e-7


def test_cut_noise_follows_the_truncated_distribution_and_whole_noise_the_probabilities():
    """400,000 samples each (seed 0), level 0.001. Controls: each against the other's distribution."""
    noise = torch.empty(SAMPLES, 4).exponential_(generator=torch.Generator().manual_seed(0))
    cut = sampled(noise + np.exp(-1.0))  # Exp(1) above exp(-1), as G is at most 1
    whole, sharper = sampled(noise), truncated(PROBABILITIES, 1.0)
    assert chi_square(whole, PROBABILITIES) < LIMIT and chi_square(cut, sharper) < LIMIT
    assert chi_square(cut, PROBABILITIES) > 1000 and chi_square(whole, sharper) > 1000


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_the_smallest_noise_is_below_the_grid_of_uniforms(device):
    """1e8 numbers (seed 0): that none is below 2^-24 has a chance of exp(-5.96), 0.3 %, for exact noise, and is certain
    for noise made of float32 uniforms, the control."""
    generators = [torch.Generator(device).manual_seed(0)]
    smallest = min(float(exponential_noise(1, 10_000_000, generators, device).min()) for _ in range(10))
    assert 0 < smallest < 2**-24
    uniform = torch.rand(10_000_000, generator=generators[0], device=device)
    coarse = -torch.log(1 - uniform[uniform > 0]).min()
    assert coarse >= 2**-24
