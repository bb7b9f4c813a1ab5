"""What a reader learns from, and readers that know fewer words."""

from pathlib import Path

import numpy as np
import pytest
import torch

from studio.checkpoints.loading import load
from studio.errors import StudioError
from studio.training import (
    reader,
    reader_network,
)
from studio.training.options import merge
from tests.training.tiny_recipes import run


@pytest.mark.parametrize("kind", ["reader", "tower"])
def test_a_reader_that_knows_fewer_words_keeps_them_and_learns_the_others(kind, small, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(reader_network, "load_concepts", lambda: ())
        before = reader_network.build_processor()
    model = reader_network.build_model(len(before.tokenizer))
    for part in (before, model):
        part.save_pretrained(tmp_path / "before")
    rows = model.get_input_embeddings().weight
    found = run(kind, tmp_path / "run", steps=1, init_from=str(tmp_path / "before"), learning_rate=1e-12)
    pipe = load(found["folder"], device="cpu", dtype=torch.float32)
    words, known = pipe.processor.tokenizer.get_vocab(), before.tokenizer.get_vocab()
    assert set(known) < set(words)
    for word, number in words.items():
        row = pipe.model.get_input_embeddings().weight[number]
        expected = rows[known[word]] if word in known else row
        assert torch.allclose(row, expected, atol=1e-3), word
        assert row.norm() > 0 or word == "<pad>", word
        assert word in known or row.norm() < 0.1 * rows.norm(dim=1).mean(), word  # not among the likely answers


@pytest.mark.parametrize(
    "settings, tiles",
    [
        ({"max_tiles": 1, "single_share": 0.0}, {(1, 1)}),
        ({"max_tiles": 2, "single_share": 0.0}, {(1, 1), (1, 2), (2, 1), (2, 2)}),
        ({"single_share": 1.0}, {(1, 1), (2, 2)}),
    ],
)
def test_images_that_a_reader_learns_from(settings, tiles, small, monkeypatch):
    monkeypatch.setattr(reader, "TILES", ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3)))
    recipe = reader.ReaderRecipe(merge({"kind": "reader", "model": settings}), torch.device("cpu"), Path)
    recipe.build()
    rng, seen = np.random.default_rng(0), set()
    for _ in range(20):
        sizes = recipe.batch(rng, 1)["image_sizes"]
        seen |= {tuple(-(-side // reader.TILE) for side in size) for size in sizes.tolist()}
    assert seen == tiles


@pytest.mark.parametrize(
    "settings", [{"max_tiles": 5}, {"max_tiles": 0}, {"single_share": 1.5}, {"single_share": -0.1}]
)
def test_images_that_a_reader_cannot_learn_from(settings, small, tmp_path):
    with pytest.raises(StudioError, match=f"{next(iter(settings))} must be .* (to|at most|at least) "):
        run("reader", tmp_path / "run", steps=1, model=settings)
