"""What `emoji-rq-ar` learns from: codes, earlier cells that mislead; and that learning helps."""

import numpy as np
import pytest
import torch

from studio.decoding.cell_by_cell import cell_by_cell
from studio.decoding.sampling import Sampling
from studio.training import emoji_rq_ar, from_codes, from_words

CPU = torch.device("cpu")


@pytest.fixture
def recipe(monkeypatch, few_pictures, tiny_folder, tiny_resgen_folder):
    """The recipe over twenty pictures, at a tiny size."""
    few_pictures(20)
    monkeypatch.setattr(from_words, "TEXT", str(tiny_folder))
    monkeypatch.setattr(from_codes, "IMAGE_TOKENIZER", str(tiny_resgen_folder / "image_tokenizer"))
    tiny = {"dim": 32, "spatial_layers": 1, "depth_layers": 1, "spatial_heads": 2, "depth_heads": 2}
    monkeypatch.setattr(emoji_rq_ar, "SIZES", {**emoji_rq_ar.SIZES, **tiny})
    return emoji_rq_ar.EmojiRQAR()


def test_what_it_learns_from(recipe):
    module = recipe.build(CPU)
    batch = recipe.batch(np.random.default_rng(0), 64, CPU)
    codes, fed = batch["codes"], batch["fed"]
    assert codes.shape == fed.shape == (64, 16, 3)
    known = {tuple(picture.flatten().tolist()) for picture in recipe.codes}
    assert all(tuple(picture.flatten().tolist()) in known for picture in codes)
    wrong = (fed != codes).any(dim=-1)
    assert 0.2 < wrong.any(dim=1).double().mean() < 0.8 and torch.equal(fed[wrong], codes.roll(1, dims=0)[wrong])
    loss = module(**batch)
    loss.backward()
    assert loss.isfinite() and all(part.grad is not None for part in module.transformer.parameters())
    for frozen in (module.text_encoder, module.quantizer):
        assert all(part.grad is None for part in frozen.parameters())


def test_each_loss_is_that_of_the_network(recipe):
    """Where nothing misleads, the loss is that of whole pictures; other earlier cells make it another."""
    torch.manual_seed(0)
    module = recipe.build(CPU).eval()
    for part in module.transformer.parameters():
        torch.nn.init.normal_(part, std=0.5)
    batch = recipe.batch(np.random.default_rng(0), 4, CPU)
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    said, grid, codes = module.condition(**words), (4, 4), batch["codes"]
    logits, _ = module.transformer(
        codes.unflatten(1, grid), said["captions"], module.quantizer.tables, valid=said["caption_mask"]
    )
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 3), codes.flatten())
    torch.testing.assert_close(module(codes, codes, **words), whole)
    assert not torch.allclose(module(codes, (codes + 1) % 16, **words), whole)


def test_what_was_learned_is_drawn(recipe):
    """Two captions of one picture each, 100 steps: the likeliest codes are those of the pictures."""
    torch.manual_seed(0)
    module = recipe.build(CPU)
    batch = recipe.batch(np.random.default_rng(1), 2, CPU)
    batch |= {"codes": torch.randint(16, (2, 16, 3))}
    batch["fed"] = batch["codes"]
    optimizer = torch.optim.AdamW(module.transformer.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        loss = module(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = module.eval().condition(batch["input_ids"], batch["attention_mask"])
    drawn = cell_by_cell(
        module.transformer,
        said["captions"],
        module.quantizer.tables,
        valid=said["caption_mask"],
        generators=[torch.Generator(), torch.Generator()],
        sampling=Sampling(temperature=0),
        guidance_scale=1.5,
    )
    assert (drawn.flatten(1, 2) == batch["codes"]).double().mean() > 0.9
