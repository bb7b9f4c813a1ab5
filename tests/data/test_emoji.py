"""The shipped set: its size, its splits, its captions."""

import numpy as np

from studio.data.archive import ARCHIVE, STYLES, load_concepts, load_images
from studio.data.backgrounds import NAMES, PALETTE, compose
from studio.data.captions import full_caption, random_caption
from studio.data.splits import combinations, concepts


def test_a_thousand_distinct_concepts_under_16_mib():
    labels = [concept.label for concept in load_concepts()]
    assert len(labels) == len(set(labels)) >= 1000 and "red apple" in labels
    assert ARCHIVE.stat().st_size < 16 * 2**20 and len(NAMES) == 10


def test_images_are_there_in_both_styles():
    images = load_images(32)
    assert images.shape == (len(load_concepts()), len(STYLES), 32, 32, 4)
    assert (images[..., 3].reshape(-1, 32 * 32).max(axis=1) > 128).all()
    assert (images[..., :3].astype(int) <= images[..., 3:].astype(int) + 1).all(), "colours are premultiplied"


def test_compose_shows_the_background_where_alpha_is_zero():
    clear = np.zeros((10, 4, 4, 4), dtype=np.uint8)
    assert np.allclose(compose(clear, PALETTE), PALETTE[:, :, None, None])


def test_splits_are_disjoint_complete_and_of_the_stated_size():
    kept, held = concepts(False), concepts(True)
    assert sorted(kept + held) == list(range(len(load_concepts()))) and 0.03 < len(held) / len(load_concepts()) < 0.07
    train, test = combinations(False), combinations(True)
    total = len(load_concepts()) * len(STYLES) * len(NAMES)
    assert not set(train) & set(test) and len(train) + len(test) == total and 0.09 < len(test) / total < 0.11


def test_captions_name_what_they_show():
    index = next(concept.index for concept in load_concepts() if concept.label == "red apple")
    assert full_caption(index, 1, NAMES.index("blue")) == "a red apple, flat style, on a blue background"
    rng = np.random.default_rng(0)
    sampled = {random_caption(index, 0, 0, rng) for _ in range(50)}
    assert len(sampled) > 5 and not any("flat" in caption or "blue" in caption for caption in sampled)


def test_a_style_is_named_where_the_other_one_is_held_out():
    """Of 60 captions each; for a combination whose styles are all to be learned, some leave it open."""
    held, rng = set(combinations(True)), np.random.default_rng(0)
    alone = next(row for row in combinations(False) if (row[0], 1 - row[1], row[2]) in held)
    beside = next(row for row in combinations(False) if (row[0], 1 - row[1], row[2]) not in held)
    assert all(STYLES[alone[1]] in random_caption(*alone, rng) for _ in range(60))
    assert not all(STYLES[beside[1]] in random_caption(*beside, rng) for _ in range(60))
