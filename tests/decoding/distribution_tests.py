"""Tests of continuous distributions: one sample against a known distribution, two samples against each other by
permutation."""

import math

import torch

LEVEL = 1e-3
PERMUTATIONS = 500
"""A two-sample statistic above all permuted ones has a level of 1 in 501."""


def normal_cdf(mean, std):
    """The distribution function of a Gaussian."""
    return lambda x: torch.special.ndtr((x.double() - mean) / std)


def ks_excess(sample, cdf, level=LEVEL):
    """How far the Kolmogorov-Smirnov distance of a sample (n,) exceeds its critical value; below 0: the distribution
    fits."""
    ordered, n = sample.double().sort().values, len(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    below = cdf(ordered)
    distance = torch.maximum((steps[1:] - below).max(), (below - steps[:-1]).max())
    return float(distance) - math.sqrt(-math.log(level / 2) / 2 / n)


def permutation_excess(kernel, seed):
    """How far the two halves that a symmetric kernel (2n, 2n) belongs to are apart, over the farthest of permuted ones.

    The statistic is the mean of the kernel within halves less that across; below 0: the halves may share a
    distribution.
    """
    half = len(kernel) // 2
    generator = torch.Generator().manual_seed(seed)
    signs = torch.cat((torch.ones(half), -torch.ones(half)))
    columns = [signs] + [signs[torch.randperm(2 * half, generator=generator)] for _ in range(PERMUTATIONS)]
    signs = torch.stack(columns, dim=1)
    statistics = (signs * (kernel.float() @ signs)).sum(dim=0)
    return float(statistics[0] - statistics[1:].max()) / half**2


def mmd_excess(x, y, seed=0):
    """`permutation_excess` of samples (n, D) under a Gaussian kernel of the median distance."""
    distances = torch.cdist(torch.cat((x, y)).double(), torch.cat((x, y)).double())
    return permutation_excess((-0.5 * (distances / distances.median()).square()).exp(), seed)


def energy_excess(x, y, seed=0):
    """`permutation_excess` of the energy distance between samples (n, D)."""
    return permutation_excess(-torch.cdist(torch.cat((x, y)).double(), torch.cat((x, y)).double()), seed)


def cell_excess(sample, samples, cells=8):
    """How far the chi-square of a sample (n, 2), in cells of quantiles of exact samples, exceeds its critical value.

    The critical value is that of level 1e-3, by the cube-root approximation of Wilson and Hilferty.
    """
    edges = torch.arange(1, cells, dtype=torch.float64) / cells

    def counts(points):
        numbers = [
            torch.searchsorted(samples[:, axis].double().quantile(edges), points[:, axis].double().contiguous())
            for axis in (0, 1)
        ]
        return torch.bincount(numbers[0] * cells + numbers[1], minlength=cells**2).double()

    expected = counts(samples) * len(sample) / len(samples)
    statistic = ((counts(sample) - expected).square() / expected / (1 + len(sample) / len(samples))).sum()
    freedom = cells**2 - 1
    spread = 2 / (9 * freedom)
    return float(statistic) - freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3


def moments_fit(sample, mean, covariance, bound=4.5):
    """Whether means and covariances of a sample (n, D) are within `bound` standard errors."""
    sample, n = sample.double(), len(sample)
    errors = (sample.mean(dim=0) - mean).abs() / sample.std(dim=0) * math.sqrt(n)
    centred = sample - mean
    products = centred[:, :, None] * centred[:, None, :]
    wrong = (products.mean(dim=0) - covariance).abs() / products.std(dim=0) * math.sqrt(n)
    return bool((errors < bound).all() and (wrong < bound).all())
