"""Recipes on a folder of images: classes, captions, and a run that was stopped."""

import numpy as np
import pytest
import torch

from studio.checkpoints.loading import load
from studio.errors import StudioError
from studio.training import (
    loop,
    train,
)
from tests.training.tiny_recipes import GENERATORS, RECIPES, TINY, build, read, run


@pytest.mark.parametrize("kind", GENERATORS)
def test_classes_of_a_folder(kind, small, image_folder, tmp_path):
    folder = image_folder(classes=("cat", "dog", "fox"))
    result = run(kind, tmp_path / kind, data=folder)
    pipe = load(result["folder"], device="cpu")
    assert pipe.transformer.config.num_classes == 3 and not pipe.takes_text
    assert pipe.id2label == {0: "cat", 1: "dog", 2: "fox"}
    assert pipe(class_labels="Fox", output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", GENERATORS)
def test_captions_of_a_folder_bring_a_text_encoder_of_their_own(kind, small, image_folder, tmp_path):
    folder = image_folder(captions=True)
    start = run(kind, tmp_path / kind, data=folder, steps=3)
    pipe = load(start["folder"], device="cpu")
    assert pipe.takes_text and pipe("a red pattern", output_type="pt").images.shape == (1, 3, 16, 16)
    trained = pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.o.weight
    assert trained.abs().max() > 0  # starts at zero


@pytest.mark.parametrize("kind", ["vq", "rvq"])
def test_a_tokenizer_of_a_folder_resumes_to_the_same_weights(kind, small, image_folder, tmp_path, monkeypatch):
    """Codebooks are averages, and dead codes are revived at random: stopped in the middle, the result is the same."""
    folder, recipe = image_folder(), RECIPES[kind]
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1)
    whole = run(kind, tmp_path / "whole", data=folder, steps=4, accumulate=2, flip=True, crop="random")
    batch, calls = recipe.batch, []

    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return batch(self, *args, **kwargs)

    again = {"data": folder, "steps": 4, "accumulate": 2, "flip": True, "crop": "random"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "batch", stopped)
        run(kind, tmp_path / "broken", **again)
    resumed = run(kind, tmp_path / "broken", resume=True, **again)
    before, after = (read(kind, result["folder"]).state_dict() for result in (whole, resumed))
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert resumed["loss"] == whole["loss"] and resumed["validation_loss"] == whole["validation_loss"]


def test_a_batch_of_one_image_is_enough(small, image_folder, tmp_path):
    for kind in ("vq", "rvq"):
        result = train(kind=kind, data=str(image_folder()), out=tmp_path / kind, steps=1, batch_size=1, **TINY[kind])
        assert np.isfinite(result["loss"]) and np.isfinite(result["validation_loss"]), kind


def test_captions_and_classes_are_not_mistaken_for_each_other(small, image_folder, tmp_path):
    classes, plain = image_folder(classes=("a", "b")), image_folder(name="plain")
    build("vq", tmp_path / "vq")
    with pytest.raises(StudioError, match="neither captions .* nor sub-folders"):
        run("llamagen", tmp_path / "run", data=plain)
    with pytest.raises(StudioError, match="no captions, which text-encoder"):
        run("text-encoder", tmp_path / "run", data=classes)
    with pytest.raises(StudioError, match="leave out --text-encoder"):
        run("llamagen", tmp_path / "run", data=classes, text_encoder="vq")
    with pytest.raises(StudioError, match="emoji set"):
        run("judge", tmp_path / "run", data=classes)
