"""What single recipes make of a batch."""

import numpy as np
import torch

from studio.training import (
    llamagen,
    one_d_piece,
)
from studio.training.options import merge
from tests.training.tiny_recipes import GENERATORS, TINY, build


def test_lengths_are_spread_evenly():
    """20,000 lengths (seed 0): each of 8 within 5 standard deviations of its share, one in each half."""
    rng = np.random.default_rng(0)
    lengths = np.array([one_d_piece.random_lengths(2, 8, rng) for _ in range(10000)])
    assert (lengths[:, 0] <= 4).all() and (lengths[:, 1] > 4).all()
    counts = np.bincount(lengths.reshape(-1), minlength=9)[1:]
    assert (np.abs(counts - 2500) < 5 * (10000 * 0.25 * 0.75) ** 0.5).all()
    assert set(one_d_piece.random_lengths(4, 4, rng)) == {1, 2, 3, 4}


def built(kind, tmp_path, **options):
    """A recipe with its module, at a tiny size."""
    from studio.training import Finder

    if kind in GENERATORS:
        build("vq", tmp_path / "vq")
        options["tokenizer"] = "vq"
    cls = {"llamagen": llamagen.LlamaGenRecipe, "one-d-piece": one_d_piece.OneDPieceRecipe}[kind]
    recipe = cls(merge({"kind": kind, **TINY[kind], **options}), torch.device("cpu"), Finder(tmp_path / "run"))
    torch.manual_seed(0)
    return recipe, recipe.build()


def test_a_batch_is_restored_from_several_lengths(small, tmp_path):
    recipe, module = built("one-d-piece", tmp_path)
    batch = recipe.batch(np.random.default_rng(0), 6)
    assert len(batch["lengths"]) == one_d_piece.GROUPS
    kept = []
    decode = module.tokenizer.decode_vectors
    module.tokenizer.decode_vectors = lambda part, length: kept.append((len(part), length)) or decode(part, length)
    assert module.eval()(**batch).isfinite()
    assert [length for _, length in kept] == batch["lengths"].tolist() and sum(n for n, _ in kept) == 6


def test_the_maps_of_the_codebook_are_merged_into_the_tables(small, tmp_path):
    recipe, module = built("llamagen", tmp_path)
    module.eval()
    batch = recipe.batch(np.random.default_rng(0), 4, training=False)
    torch.nn.init.normal_(module.transformer.output.weight)

    def loss(transformer):
        return llamagen.TrainableLlamaGen(transformer, recipe.text, module.codebook).eval()(**batch)

    without = loss(module.transformer)
    torch.nn.init.normal_(module.code_embedding)
    torch.nn.init.normal_(module.code_output)
    assert torch.allclose(module(**batch), loss(module.merged()), atol=1e-4)
    assert not torch.allclose(module(**batch), without, atol=1e-2)


def test_earlier_tokens_are_hidden_and_misleading_in_some_images(small, tmp_path):
    """2,000 rows (seed 0): the share of rows with marks within 5 standard deviations, any number of them; controls."""
    rng, shape = np.random.default_rng(0), (2000, 63)
    for marks in (llamagen.scattered, llamagen.stretches):
        assert not marks(shape, 0.0, rng).any()
        marked = marks(shape, 0.5, rng)
        share, filled = marked.any(axis=1).mean(), marked.mean(axis=1)
        assert abs(share - 0.5) < 5 * (0.25 / 2000) ** 0.5 + 1 / 63
        assert filled.max() > 0.9 and 0.1 < np.median(filled[filled > 0]) < 0.6
    runs = np.diff(llamagen.stretches(shape, 1.0, rng).astype(int), prepend=0, append=0, axis=1)
    assert ((runs == 1).sum(axis=1) <= 1).all()
    recipe, _ = built("llamagen", tmp_path)
    batch = recipe.batch(rng, 40)
    true, others = batch["tokens"][:, :-1], batch["tokens"].roll(1, dims=0)[:, :-1]
    wrong = batch["fed"] != true
    assert wrong.any() and not wrong.all() and torch.equal(batch["fed"][wrong], others[wrong])
