"""A tokenizer for larger images learns the tokens of a smaller one, and to restore from these."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from studio.checkpoints.loading import load
from studio.errors import StudioError
from studio.training.from_vq import levels_of
from studio.training.kl import KLRecipe
from studio.training.one_d_piece import OneDPieceRecipe, larger_patches
from studio.training.rvq import RVQRecipe
from studio.training.same_tokens import OF_IMAGE

SMALL = {"data": "emoji", "size": 32, "grid": 4, "dim": 32, "layers": 1}
LARGE = {**SMALL, "size": 64}
KINDS = [(KLRecipe, {"latent_channels": 4}), (RVQRecipe, {"z_channels": 32, "feature_dim": 4, "depth": 2})]


@pytest.fixture(params=KINDS, ids=["kl", "rvq"])
def trained(request, few_images, recipe, tmp_path):
    """A recipe of a tokenizer of 64 px, its module, and the folder of one of 32 px with random weights."""
    few_images(8)
    torch.manual_seed(0)
    cls, model = request.param
    small = recipe(cls, model=model, **SMALL)
    module = small.build()
    if cls is RVQRecipe:
        module.train()(torch.rand(16, 3, 32, 32) * 2 - 1, torch.tensor([2]))  # the codebooks start from vectors
    small.export(module, tmp_path / "small")
    large = recipe(cls, model={**model, "same_tokens_as": str(tmp_path / "small")}, **LARGE)
    return large, large.build(), tmp_path / "small"


def network(tokenizer):
    return getattr(tokenizer, "network", tokenizer)


@torch.no_grad()
def test_it_starts_from_all_but_what_is_beside_the_pixels(trained):
    _, module, _ = trained
    large, small = (network(made).state_dict() for made in (module.tokenizer, module.reference))
    assert levels_of(network(module.tokenizer)) == levels_of(network(module.reference)) + 1
    equal = [weight for weight in small.values() if any(torch.equal(weight, other) for other in large.values())]
    assert len(equal) >= len([name for name in small if not name.startswith(OF_IMAGE)])


def test_it_learns_the_tokens_and_leaves_the_other_as_it_is(trained, tmp_path):
    """Three batches over and over: vectors come nearer, and images of the same tokens do too."""
    made, module, folder = trained
    before = {name: weight.clone() for name, weight in module.reference.state_dict().items()}
    images = F.interpolate(torch.rand(8, 3, 16, 16) * 2 - 1, scale_factor=4)
    choices = {name: value for name, value in made.batch(np.random.default_rng(0), 8).items() if name != "images"}

    def errors():
        with torch.no_grad():
            torch.manual_seed(1)
            wanted, fed = module.tokens_of(F.avg_pool2d(images, 2), choices)
            return F.mse_loss(module.vectors(images), wanted), module.restoration(fed, images)

    first = errors()
    optimizers = made.optimizers(module, 3e-3)
    for _ in range(30):
        module(images, **choices).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    last = errors()
    assert last[0] < 0.5 * first[0] and last[1] < 0.8 * first[1]
    for name, weight in module.reference.state_dict().items():
        assert torch.equal(weight, before[name]), name
    made.export(module, tmp_path / "large")
    large, small = (load(path, device="cpu", dtype=torch.float32) for path in (tmp_path / "large", folder))
    assert large.config.sample_size == 64
    if hasattr(small, "quantizer"):
        assert all(torch.equal(*pair) for pair in zip(large.codebooks, small.codebooks, strict=True))
    else:
        assert large.config.scaling_factor == small.config.scaling_factor


@pytest.mark.parametrize("sizes", [{"size": 32}, {"size": 64, "grid": 8}])
def test_other_sizes_are_refused(trained, recipe, sizes):
    made, _, folder = trained
    other = recipe(type(made), model={"same_tokens_as": str(folder)}, **{**LARGE, **sizes})
    with pytest.raises(StudioError, match="4x4 tokens for 32 px"):
        other.build()


@pytest.fixture
def rows(few_images, recipe, tmp_path):
    """A recipe of rows for 32 px, its module, and a tokenizer of 16 px with random weights."""
    few_images(8)
    torch.manual_seed(0)
    small = {"data": "emoji", "size": 16, "tokens": 8, "codes": 16, "dim": 32, "layers": 1}
    made = recipe(OneDPieceRecipe, model={"patch_size": 4}, **small)
    module = made.build()
    torch.nn.init.normal_(module.tokenizer.pixel_decoder.conv_out.weight, std=0.1)
    made.export(module, tmp_path / "small")
    large = recipe(OneDPieceRecipe, model={"same_tokens_as": str(tmp_path / "small")}, **{**small, "size": 32})
    return large, large.build(), load(tmp_path / "small", device="cpu", dtype=torch.float32)


@torch.no_grad()
def test_rows_start_as_the_other_with_each_pixel_repeated(rows):
    _, module, small = rows
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    tokens = module.tokenizer.encode(images)
    assert torch.equal(tokens, small.encode(F.avg_pool2d(images, 2)))
    expected = F.interpolate(small.decode(tokens, 5), scale_factor=2)
    torch.testing.assert_close(module.tokenizer.decode(tokens, 5), expected, atol=1e-5, rtol=1e-5)


def test_rows_are_restored_better_and_stay_what_they_are(rows, tmp_path):
    made, module, small = rows
    batch = made.batch(np.random.default_rng(0), 8)
    first = module(**batch).item()
    optimizers = made.optimizers(module, 3e-3)
    for _ in range(20):
        module(**batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert module(**batch).item() < 0.9 * first
    made.export(module, tmp_path / "large")
    large = load(tmp_path / "large", device="cpu", dtype=torch.float32)
    assert torch.equal(large.encode(batch["images"]), small.encode(F.avg_pool2d(batch["images"], 2)))


def test_rows_of_another_size_are_refused(rows):
    with pytest.raises(StudioError, match="images of 16 px"):
        larger_patches(rows[2], 24)
