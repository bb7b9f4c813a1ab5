"""The emoji set as a source: what is held out, from whom, and how training images of a tokenizer vary."""

import hashlib

import numpy as np
import pytest
import torch

from studio.data.archive import ARCHIVE, STYLES, load_concepts
from studio.data.backgrounds import NAMES, PALETTE
from studio.data.captions import full_caption, prompt_completion
from studio.data.emoji import EmojiSource
from studio.data.source import open_source
from studio.data.splits import combinations, concepts


@pytest.fixture(scope="module")
def source():
    return open_source("emoji", 16)


def rows(examples):
    return set(map(tuple, examples.rows.tolist()))


def test_generators_and_tokenizers_are_held_back_different_images(source):
    assert isinstance(source, EmojiSource) and source.has_captions and source.class_names is None
    assert rows(source.train) == set(combinations(held_out=False))
    assert rows(source.validation) == set(combinations(held_out=True))
    unseen = set(concepts(held_out=True))
    assert {concept for concept, *_ in rows(source.unseen)} == unseen
    assert len(rows(source.unseen)) == len(source.unseen) == len(unseen) * len(STYLES) * len(NAMES)
    assert len(source.pixels) == len(concepts(held_out=False)) * len(STYLES)


def test_the_first_examples_are_a_sample(source):
    """Of the 60 first, which sheets and short measures take: many concepts, both styles, nearly all backgrounds."""
    for examples in (source.validation, source.unseen):
        first = examples.rows[:60]
        assert len(set(first[:, 0])) > 25 and len(set(first[:, 1])) == 2 and len(set(first[:, 2])) >= 9
        assert np.array_equal(EmojiSource(16).validation.rows[:60], source.validation.rows[:60])


def test_an_image_is_what_its_row_says(source):
    images = source.validation.images(range(10))
    assert (
        images.shape == (10, 3, 16, 16) and images.dtype == torch.float32 and -1 <= images.min() and images.max() <= 1
    )
    corners = (images[:, :, 0, 0] + 1) / 2
    torch.testing.assert_close(
        corners, torch.from_numpy(PALETTE[source.validation.rows[:10, 2]]).float(), atol=0.01, rtol=0
    )
    assert torch.equal(images, source.validation.images(range(10)))


def test_captions_are_full_or_one_of_many_wordings(source):
    row = tuple(source.train.rows[5].tolist())
    assert source.train.captions([5]) == [full_caption(*row)]
    rng = np.random.default_rng(0)
    assert len(set(source.train.captions([5] * 40, rng))) > 5
    corpus = source.caption_corpus()
    assert {concept.label for concept in load_concepts()} <= set(corpus) and len(corpus) < 20_000
    assert source.prompt_settings() == {"lowercase_prompts": True, "prompt_completion": prompt_completion()}


def test_training_images_of_a_tokenizer_are_decided_by_the_generator_and_vary(source):
    first, again, other = (source.augmented(np.random.default_rng(seed), 64) for seed in (0, 0, 1))
    assert first.shape == (64, 3, 16, 16) and torch.equal(first, again) and not torch.equal(first, other)
    assert -1 <= first.min() and first.max() <= 1
    corners = (first[:, :, 0, 0] + 1) / 2
    named = (torch.cdist(corners, torch.from_numpy(PALETTE).float()) < 0.02).any(dim=1).float().mean()
    assert 0.3 < named < 0.8  # 60 % less what was recoloured


def test_the_checksum_is_of_archive_and_size(source):
    of_size = {size: hashlib.sha256(ARCHIVE.read_bytes() + str(size).encode()).hexdigest() for size in (16, 32)}
    assert source.checksum == of_size[16] and EmojiSource(32).checksum == of_size[32] != of_size[16]
    assert source.skipped == [] and "Fluent Emoji (MIT)" in source.description
