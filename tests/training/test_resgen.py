"""What a resgen learns from: hidden levels, where means start, how wide they are; and that learning helps."""

import numpy as np
import pytest
import torch

from studio.decoding.resgen import FirstHitting, ResGenDecoding, resgen_decoding
from studio.decoding.residual_masks import hidden_slots, hide
from studio.decoding.sampling import Sampling
from studio.models.resgen import ResGen
from studio.tokenizers.residual_quantizer import ResidualQuantizer
from studio.training.resgen import ResGenRecipe


@pytest.fixture
def tiny(few_images, recipe, tiny_folder, tiny_resgen_folder):
    """A function: a recipe over twenty images, at a tiny size."""
    few_images(20)
    parts = {"tokenizer": str(tiny_resgen_folder / "image_tokenizer"), "text_encoder": str(tiny_folder)}

    def made(prediction="mixture"):
        model = {"prediction": prediction, "num_heads": 2, "components": 12, "rank": 2}
        return recipe(ResGenRecipe, dim=16, layers=1, model=model, **parts)

    return made


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_what_it_learns_from(tiny, prediction):
    made = tiny(prediction)
    module = made.build()
    assert made.codes.shape == made.unseen.shape == (20, 16, 3) and made.codes.max() < 16
    batch = made.batch(np.random.default_rng(0), 64)
    known = {tuple(codes.flatten().tolist()) for codes in made.codes}
    assert all(tuple(codes.flatten().tolist()) in known for codes in batch["codes"])
    hidden = batch["hidden"]
    assert hidden.shape == (64, 16) and hidden.min() >= 0 and hidden.max() == 3 and (hidden.sum(dim=1) >= 1).all()
    assert 0.4 < hidden.double().mean() / 3 < 0.9  # the mean of the cosine is 2 / pi
    loss = module(**batch)
    loss.backward()
    assert loss.isfinite() and all(part.grad is None for part in module.text_encoder.parameters())
    assert all(part.grad is None for part in module.quantizer.parameters())
    moved = [id(part) for group in made.optimizers(module, 1e-3) for part in _parameters(group)]
    assert sorted(moved) == sorted(id(part) for part in module.transformer.parameters() if part.requires_grad)


def _parameters(optimizer):
    return [part for group in optimizer.param_groups for part in group["params"]]


def test_the_ablation_differs_in_its_head_alone(tiny):
    mixture, softmax = (tiny(prediction).build().transformer for prediction in ("mixture", "levels"))
    shapes, others = (
        {name: part.shape for name, part in model.state_dict().items() if not name.startswith("head.")}
        for model in (mixture, softmax)
    )
    assert shapes == others and softmax.config.prediction == "levels"
    assert softmax.head.linear.weight.shape == (3 * 16, 16)


def test_components_start_where_the_data_lie(tiny):
    made = tiny()
    module, quantizer = made.build(), made.image_tokenizer.quantizer
    vectors = quantizer.lookup(made.codes.flatten(0, 1).unique(dim=0))
    sums = torch.cat([vectors[:, depth:].sum(dim=1) for depth in range(3)])
    nearest = torch.cdist(module.transformer.head.offsets, sums).amin(dim=1)
    assert nearest.max() < 1e-4
    rest = float(module.transformer.head.sigma)
    assert rest == pytest.approx(made.left_over()) and 0 < rest < float(vectors.sum(dim=1).std()) * 10


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_what_was_learned_is_sampled(prediction):
    """Two classes of one image each, 200 steps: every sampler samples most of their codes, any number of calls."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer((4, 4), 3, shared=False)
    quantizer.codebooks[1].weight.data.mul_(0.3)
    model = ResGen(
        num_positions=4, depth=2, vocab_size=4, code_dim=3, dim=32, num_layers=1, num_heads=2, num_classes=2,
        prediction=prediction, components=8, rank=3, sigma=0.1,
    )  # fmt: skip
    images, labels = torch.randint(4, (2, 4, 2)), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        rows = torch.arange(16) % 2
        hidden = hide(torch.rand(16, 4, 2), hidden_slots(torch.rand(16), 8).clamp(min=1))
        loss = model.loss(quantizer.lookup(images[rows]), images[rows], hidden, class_labels=labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for settings in (ResGenDecoding(steps=1), ResGenDecoding(steps=3), FirstHitting(steps=8)):
        sampled = resgen_decoding(
            model.eval(),
            quantizer,
            {"class_labels": labels},
            generators=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
            sampling=Sampling(temperature=0),
            settings=settings,
        ).tokens
        assert (sampled == images).double().mean() > 0.9, settings
