"""The recipes of MAR at a tiny size: what batches are made of, and what a drafter learns."""

import copy

import numpy as np
import pytest
import torch

from studio.training.mar import MARRecipe, masked_share
from studio.training.mar_drafter import MARDrafterRecipe, TrainableMARDrafter
from tests.decoding.tiny_mar import tiny_mar


@pytest.fixture(autouse=True)
def few(few_images):
    few_images(40)


@pytest.fixture
def drafter_recipe(recipe, tiny_mar_folder):
    return recipe(MARDrafterRecipe, target=str(tiny_mar_folder), dim=32, model={"head_width": 32, "head_depth": 1})


@pytest.mark.parametrize("kind", ["mar", "drafter"])
def test_batches_follow_from_the_seed_alone(kind, recipe, drafter_recipe, tiny_mar_folder, tiny_folder):
    made = drafter_recipe
    if kind == "mar":
        parts = {"tokenizer": str(tiny_mar_folder / "image_tokenizer"), "text_encoder": str(tiny_folder)}
        made = recipe(MARRecipe, dim=32, layers=2, model={"head_width": 32, "head_depth": 1}, **parts)
    made.build()
    first, same, other = (made.batch(np.random.default_rng(seed), 3) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["latents"], other["latents"])
    assert first["latents"].shape == (3, 3, 4, 4) and 0.7 * 16 <= first["masked"] <= 16
    assert torch.equal(first["order"].sort(dim=1).values, torch.arange(16).expand(3, -1))


def test_shares_of_masked_tokens():
    """2,000 samples, seed 0: the mean of the truncated Gaussian is 0.867, five standard errors are below 0.01."""
    rng = np.random.default_rng(0)
    shares = [masked_share(rng) for _ in range(2000)]
    assert 0.7 <= min(shares) and max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.867, abs=0.01)


def test_a_drafter_learns_what_its_target_predicts(drafter_recipe):
    built = drafter_recipe.build()
    batch = drafter_recipe.batch(np.random.default_rng(0), 16)
    same = TrainableMARDrafter(copy.deepcopy(built.target), built.target)
    assert float(same(**batch)) == 0
    text = {"num_classes": None, "caption_dim": 16, "caption_length": 8}
    module = TrainableMARDrafter(tiny_mar(3, token_dim=3, **text), built.target).train()
    optimizer = torch.optim.AdamW(module.drafter.parameters(), lr=1e-3)
    losses = []
    for step in range(60):
        torch.manual_seed(step % 4)
        loss = module(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert not module.target.training and all(p.grad is None for p in module.target.parameters())
