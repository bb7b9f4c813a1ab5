"""Distances between images, and between sets of features. All in float32 or float64, on any device."""

import torch
import torch.nn.functional as F

from studio.errors import StudioError


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, C, H, W) in [0, 1] twice -> (B,)."""
    return -10 * (images - references).square().mean(dim=(1, 2, 3)).clamp_min(1e-12).log10()


def ssim(images: torch.Tensor, references: torch.Tensor, sigma: float = 1.5, size: int = 11) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window 11, sigma 1.5): (B, C, H, W) in [0, 1] twice -> (B,)."""
    offsets = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = window / window.sum()
    channels = images.shape[1]
    kernel = torch.outer(window, window).expand(channels, 1, size, size)

    def blur(x):
        return F.conv2d(x, kernel, groups=channels)

    mean_x, mean_y = blur(images), blur(references)
    var_x = blur(images**2) - mean_x**2
    var_y = blur(references**2) - mean_y**2
    covariance = blur(images * references) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return index.mean(dim=(1, 2, 3))


def uniform_ssim(images: torch.Tensor, references: torch.Tensor, size: int = 7) -> torch.Tensor:
    """Structural similarity with uniform windows: (B, C, H, W) in [0, 1] twice -> (B,).

    Windows inside the image only, sample covariances, constants as in Wang et al. 2004: scikit-image's default.
    """

    def mean(x):
        return F.avg_pool2d(x, size, stride=1)

    images, references = images.double(), references.double()
    mean_x, mean_y, sample = mean(images), mean(references), size**2 / (size**2 - 1)
    var_x = (mean(images**2) - mean_x**2) * sample
    var_y = (mean(references**2) - mean_y**2) * sample
    covariance = (mean(images * references) - mean_x * mean_y) * sample
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return index.mean(dim=(1, 2, 3)).float()


def sharpness(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean absolute gradient of each image over that of its reference: (B, C, H, W) twice -> (B,)."""

    def gradient(x):
        return x.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + x.diff(dim=-2).abs().mean(dim=(1, 2, 3))

    return gradient(images) / gradient(references).clamp_min(1e-6)


def precision_recall(features: torch.Tensor, references: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991, algorithm 1).

    Args:
        features, references: (n, d) and (m, d), of generated and of true images; more than `k` each.
        k: a point's neighbourhood reaches to its k-th nearest neighbour on its own side.

    Returns:
        The share of generated images inside the neighbourhood of a true one, and the reverse.
    """

    def covered(points, centres):
        own = torch.cdist(centres, centres)
        radius = own.kthvalue(min(k + 1, len(centres)), dim=1).values
        return float((torch.cdist(points, centres) <= radius).any(dim=1).float().mean())

    return covered(features, references), covered(references, features)


def frechet_distance(features: torch.Tensor, references: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al., arXiv:1706.08500, eq. 6).

    Args:
        features, references: `(n, d)` and `(m, d)`, each with more rows than columns.

    Returns:
        A float; the trace of the root is taken from the symmetric product `S1^1/2 S2 S1^1/2` in float64.
    """
    if min(len(features), len(references)) <= features.shape[1]:
        raise StudioError(
            f"A Frechet distance in {features.shape[1]} dimensions needs more images than that on both sides."
        )
    a, b = features.double(), references.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root_a = _symmetric_root(cov_a)
    cross = _symmetric_root(root_a @ cov_b @ root_a)
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross.trace())


def sliced_distance(points: torch.Tensor, references: torch.Tensor, directions: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein distance between two sets of points: the mean over random directions of the distance between
    sorted projections (Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures", order 1).

    Args:
        points, references: `(n, d)`, as many on both sides.
        directions: random directions on the sphere.
        seed: chooses them.
    """
    if points.shape != references.shape:
        raise StudioError(f"A sliced distance needs sets of one shape, not {points.shape} and {references.shape}.")
    generator = torch.Generator().manual_seed(seed)
    axes = F.normalize(torch.randn(directions, points.shape[1], generator=generator), dim=1).to(points.device).T
    projected, expected = ((side.float() @ axes).sort(dim=0).values for side in (points, references))
    return float((projected - expected).abs().mean())


def _symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
