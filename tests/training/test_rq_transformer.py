"""What an rq-transformer learns from: codes, earlier cells that mislead; and that learning helps."""

import numpy as np
import pytest
import torch

from studio.decoding.rq_transformer import rq_decoding
from studio.decoding.sampling import Sampling
from studio.training.rq_transformer import RQTransformerRecipe


@pytest.fixture
def tiny(few_images, recipe, tiny_folder, tiny_resgen_folder):
    """The recipe over twenty images, at a tiny size."""
    few_images(20)
    parts = {"tokenizer": str(tiny_resgen_folder / "image_tokenizer"), "text_encoder": str(tiny_folder)}
    return recipe(RQTransformerRecipe, dim=32, layers=1, model={"depth_layers": 1, "num_heads": 2}, **parts)


def test_what_it_learns_from(tiny):
    module = tiny.build()
    batch = tiny.batch(np.random.default_rng(0), 64)
    codes, fed = batch["codes"], batch["fed"]
    assert codes.shape == fed.shape == (64, 16, 3)
    known = {tuple(image.flatten().tolist()) for image in tiny.codes}
    assert all(tuple(image.flatten().tolist()) in known for image in codes)
    wrong = (fed != codes).any(dim=-1)
    assert 0.2 < wrong.any(dim=1).double().mean() < 0.8 and torch.equal(fed[wrong], codes.roll(1, dims=0)[wrong])
    loss = module(**batch)
    loss.backward()
    assert loss.isfinite() and all(part.grad is not None for part in module.transformer.parameters())
    for frozen in (module.text_encoder, module.quantizer):
        assert all(part.grad is None for part in frozen.parameters())


def test_each_loss_is_that_of_the_network(tiny):
    """Where nothing misleads, the loss is that of whole images; other earlier cells make it another."""
    torch.manual_seed(0)
    module = tiny.build().eval()
    for part in module.transformer.parameters():
        torch.nn.init.normal_(part, std=0.5)
    batch = tiny.batch(np.random.default_rng(0), 4)
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    said, grid, codes = module.condition(**words), (4, 4), batch["codes"]
    logits, _ = module.transformer(
        codes.unflatten(1, grid), said["captions"], module.quantizer.tables, valid=said["caption_mask"]
    )
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 3), codes.flatten())
    torch.testing.assert_close(module(codes, codes, **words), whole)
    assert not torch.allclose(module(codes, (codes + 1) % 16, **words), whole)


def test_what_was_learned_is_sampled(tiny):
    """Two captions of one image each, 100 steps: the likeliest codes are those of the images."""
    torch.manual_seed(0)
    module = tiny.build()
    batch = tiny.batch(np.random.default_rng(1), 2)
    batch |= {"codes": torch.randint(16, (2, 16, 3))}
    batch["fed"] = batch["codes"]
    optimizer = torch.optim.AdamW(module.transformer.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        loss = module(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = module.eval().condition(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    sampled = rq_decoding(
        module.transformer,
        said["captions"],
        module.quantizer.tables,
        valid=said["caption_mask"],
        generators=[torch.Generator(), torch.Generator()],
        sampling=Sampling(temperature=0),
        guidance_scale=1.5,
    )
    assert (sampled.flatten(1, 2) == batch["codes"]).double().mean() > 0.9
