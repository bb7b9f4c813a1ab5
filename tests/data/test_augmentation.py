"""Random changes of images: decided by the generator, in range, and blind to nothing but the subject."""

import numpy as np
import torch

from studio.data.augmentation import distort, move
from studio.training.vq import rectangles

COLOURS = np.array([[0.2, 0.4, 0.6], [0.9, 0.1, 0.5]], dtype=np.float32)


def plain():
    return torch.from_numpy(COLOURS)[:, :, None, None].expand(2, 3, 16, 16).contiguous()


def test_a_plain_background_stays_plain_when_it_is_moved():
    settings = {"share": 1.0, "zoom": (0.5, 2.0), "angle": 1.0, "shift": 0.5}
    moved = move(plain(), COLOURS, np.random.default_rng(0), **settings)
    torch.testing.assert_close(moved, plain())


def test_subjects_move_only_in_the_share_that_is_asked_for():
    images = plain()
    images[:, :, 4:8, 4:8] = 1.0
    still = move(images, COLOURS, np.random.default_rng(0), share=0.0, zoom=(0.5, 2.0), angle=1.0, shift=0.5)
    moved = move(images, COLOURS, np.random.default_rng(0), share=1.0, zoom=(0.5, 0.6), angle=0.0, shift=0.0)
    assert torch.equal(still, images) and not torch.allclose(moved, images, atol=0.1)


def test_distortion_is_decided_by_the_generator_and_stays_in_range():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, again, other = (distort(images.clone(), COLOURS, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


def test_rectangles_are_neither_empty_nor_whole():
    masks = rectangles(np.random.default_rng(0), 500, 8)
    cells = masks.sum(axis=(1, 2))
    assert masks.shape == (500, 8, 8) and cells.min() >= 1 and cells.max() < 64
    for mask in masks[:50]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert mask.sum() == rows.sum() * columns.sum()
