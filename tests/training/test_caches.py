"""Tokens and latents of training images: computed once for weights and data, kept whole or not at all."""

import numpy as np
import pytest
import torch

from studio.data.image_folder import ImageFolder
from studio.errors import StudioError
from studio.training import caches
from studio.training.caches import cached_latents, cached_tokens, latents_of, tokens_of, write_array


@pytest.fixture
def source(few_images, image_folder):
    few_images(8)
    return ImageFolder(image_folder(10), 16)


@pytest.fixture
def kept(tmp_path):
    return lambda: sorted(path.name for path in (tmp_path / "cache").glob("*.npy"))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The file whose checksum names the caches."""
    file = tmp_path / "weights"
    file.write_bytes(b"some weights")
    monkeypatch.setattr(caches, "weights_of", lambda tokenizer: file)
    return file


def test_tokens_are_those_of_the_training_images_in_order(tiny_vq, source, weights, kept, monkeypatch):
    tokens = cached_tokens(tiny_vq, source)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(source.train), 16)
    for number in range(len(source.train)):
        assert torch.equal(tokens[number], tiny_vq.encode(source.train.images([number])).flatten())
    monkeypatch.setattr(caches, "_encoded", None)
    assert torch.equal(cached_tokens(tiny_vq, source), tokens) and len(kept()) == 1


def test_latents_are_means_and_widths(tiny_mar_pipeline, source, weights, monkeypatch):
    tokenizer = tiny_mar_pipeline.image_tokenizer
    latents = cached_latents(tokenizer, source)
    assert (
        latents.dtype == torch.float16
        and latents.shape == (len(source.train), 2, 3, 4, 4)
        and latents[:, 1].gt(0).all()
    )
    expected = tokenizer.encode_distribution(source.train.images([3]))
    torch.testing.assert_close(latents[3, 0], expected.mean[0].half(), atol=1e-2, rtol=1e-2)
    monkeypatch.setattr(caches, "_encoded", None)
    assert torch.equal(cached_latents(tokenizer, source), latents)


def test_other_weights_other_data_and_other_splits_have_caches_of_their_own(
    tiny_vq, source, weights, kept, image_folder, monkeypatch
):
    cached_tokens(tiny_vq, source)
    weights.write_bytes(b"other weights")
    cached_tokens(tiny_vq, source)
    assert len(kept()) == 2
    cached_tokens(tiny_vq, ImageFolder(image_folder(11, name="more"), 16))
    assert len(kept()) == 3
    folder = source.folder
    for split in ("train", "validation"):
        (folder / split).mkdir()
    for number, file in enumerate(sorted(folder.glob("*.png"))):
        file.rename(folder / ("train" if number < 5 else "validation") / file.name)
    assert cached_tokens(tiny_vq, ImageFolder(folder, 16)).shape == (5, 16)


def test_the_first_examples_alone(tiny_vq, tiny_mar_pipeline, source):
    assert np.array_equal(tokens_of(tiny_vq, source.train, 3), tokens_of(tiny_vq, source.train)[:3])
    assert len(tokens_of(tiny_vq, source.train, 1000)) == len(source.train)
    assert latents_of(tiny_mar_pipeline.image_tokenizer, source.train, 2).shape == (2, 2, 3, 4, 4)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, full_disk, monkeypatch):
    words = "cannot hold the cache of tokens .*: free some space, or set STUDIO_CACHE"
    file = tmp_path / "cache" / "tokens-1234.npy"
    with full_disk(1000), pytest.raises(StudioError, match=words):
        write_array(file, np.zeros(5000))
    assert not list(file.parent.iterdir())
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda path: caches.shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(StudioError, match="MiB are needed"):
        write_array(file, np.zeros(5000))
    monkeypatch.undo()
    write_array(file, np.arange(5000))
    assert np.array_equal(np.load(file), np.arange(5000))
