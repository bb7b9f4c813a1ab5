"""Metrics against closed forms."""

import pytest
import torch

from studio.errors import StudioError
from studio.evaluation.metrics import frechet_distance, psnr, ssim


def test_psnr_of_a_constant_error():
    images = torch.full((2, 3, 16, 16), 0.5)
    assert psnr(images + 0.1, images).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    noisy = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (ssim(noisy, images) < 0.9).all()


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    features = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features + 1, features) == pytest.approx(4, rel=1e-4)
    centred = features - features.mean(0)
    assert frechet_distance(2 * centred, centred) == pytest.approx(float(centred.var(0).sum()), rel=1e-4)


def test_frechet_distance_refuses_too_few_images():
    with pytest.raises(StudioError, match="4 dimensions"):
        frechet_distance(torch.randn(4, 4), torch.randn(100, 4))
