"""The recipes of MAR at a tiny size: what they draw batches from, and what a drafter learns."""

import copy
import importlib.util

import numpy as np
import pytest
import torch

from studio import StudioError
from studio.training import emoji_mar, emoji_mar_draft, from_words, latent_cache
from studio.training.emoji_mar import masked_share
from studio.training.emoji_mar_draft import TrainableDraft
from studio.training.ingredients import ingredient


@pytest.fixture
def few(few_pictures):
    few_pictures(40)


@pytest.fixture
def recipe(few, monkeypatch, tiny_folder, tiny_mar_folder):
    monkeypatch.setattr(emoji_mar, "IMAGE_TOKENIZER", str(tiny_mar_folder / "image_tokenizer"))
    monkeypatch.setattr(from_words, "TEXT", str(tiny_folder))
    monkeypatch.setattr(emoji_mar_draft, "TARGET", str(tiny_mar_folder))
    return emoji_mar_draft.EmojiMARDraft()


def test_latents_are_cached_by_weights(few, tiny_mar_pipeline, tmp_path, monkeypatch):
    tokenizer = tiny_mar_pipeline.image_tokenizer
    weights = tmp_path / "weights"
    weights.write_bytes(b"some weights")
    drawn, laws = latent_cache.training_latents(tokenizer, weights)
    assert drawn.shape == (40, 3) and laws.shape == (40, 2, 3, 4, 4) and laws[:, 1].gt(0).all()
    monkeypatch.setattr(latent_cache, "_encode", None)
    assert torch.equal(latent_cache.training_latents(tokenizer, weights)[1], laws)
    weights.write_bytes(b"other weights")
    with pytest.raises(TypeError):
        latent_cache.training_latents(tokenizer, weights)


def test_batches_follow_from_the_seed_alone(recipe):
    recipe.build(torch.device("cpu"))
    first, same, other = (recipe.batch(np.random.default_rng(seed), 3, torch.device("cpu")) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["latents"], other["latents"])
    assert first["latents"].shape == (3, 3, 4, 4) and 0.7 * 16 <= first["masked"] <= 16
    assert torch.equal(first["order"].sort(dim=1).values, torch.arange(16).expand(3, -1))


def test_shares_of_masked_tokens():
    """2,000 draws, seed 0: the mean of the truncated Gaussian is 0.867, five standard errors are below 0.01."""
    rng = np.random.default_rng(0)
    shares = [masked_share(rng) for _ in range(2000)]
    assert 0.7 <= min(shares) and max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.867, abs=0.01)


def test_a_drafter_learns_what_its_target_predicts(recipe, repository):
    spec = importlib.util.spec_from_file_location("tiny_mar", repository / "tests" / "decoding" / "tiny_mar.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    built = recipe.build(torch.device("cpu"))
    batch = recipe.batch(np.random.default_rng(0), 16, torch.device("cpu"))
    same = TrainableDraft(copy.deepcopy(built.target), built.target, built.text_encoder)
    assert float(same(**batch)) == 0
    text = {"num_classes": None, "caption_dim": 16, "caption_length": 8}
    module = TrainableDraft(tiny.tiny_mar(3, token_dim=3, **text), built.target, built.text_encoder).train()
    optimizer = torch.optim.AdamW(module.drafter.parameters(), lr=1e-3)
    losses = []
    for step in range(60):
        torch.manual_seed(step % 4)
        loss = module(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert not module.target.training and all(p.grad is None for p in module.target.parameters())


def test_ingredients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudioError, match="studio train emoji-nothing"):
        ingredient("emoji-nothing")
    (tmp_path / "runs" / "emoji-nothing" / "model").mkdir(parents=True)
    assert ingredient("emoji-nothing").resolve() == tmp_path / "runs" / "emoji-nothing" / "model"
    assert ingredient(str(tmp_path)) == tmp_path
    assert ingredient("emoji-vq").name == "emoji-vq"
