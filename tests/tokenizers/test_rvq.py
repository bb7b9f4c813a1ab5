"""Residual quantisation and its tokenizer: sums, prefixes, starts at any level, gradients, moving averages."""

import pytest
import torch
import torch.nn.functional as F

from studio import StudioError
from studio.tokenizers import residual_quantizer
from studio.tokenizers.residual_quantizer import ResidualQuantizer, nearest
from studio.tokenizers.rvq import RVQTokenizer, depth_to_space, space_to_depth
from tests.tokenizers.rq_vae_training import CodebookAverages, learn_codebooks, restart_candidates, soft_codes

SIZES = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "res_blocks": 1,
    "attention_levels": (1,),
    "z_channels": 8,
    "feature_dim": 4,
    "depth": 3,
    "codebook_size": 16,
    "norm_groups": 4,
    "sample_size": 8,
}


def tiny(**more):
    torch.manual_seed(0)
    return RVQTokenizer(**{**SIZES, **more}).eval()


def quantizer(sizes=(9, 7, 8), code_dim=5, shared=False):
    torch.manual_seed(0)
    return ResidualQuantizer(sizes, code_dim, shared)


def vectors(*shape, code_dim=5):
    return torch.randn(*shape, code_dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cell", [(1, 1), (2, 1), (1, 2)])
@torch.no_grad()
def test_codes_stand_for_the_sum_of_their_vectors(cell):
    model, images = tiny(cell=cell), torch.rand(2, 3, 8, 8) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (2, 4 // cell[0], 4 // cell[1], 3) and codes.dtype == torch.int64
    sums = sum(table[code] for table, code in zip(model.codebooks, codes.unbind(-1)))
    torch.testing.assert_close(model.decode(codes), model.decode_features(sums))
    restored, commitment = model(images)
    torch.testing.assert_close(restored, model.decode(codes))
    assert commitment > 0


@torch.no_grad()
def test_blocks_of_pixels_may_be_folded_first():
    model, images = tiny(pixel_unshuffle=2), torch.rand(2, 3, 8, 8) * 2 - 1
    assert model.pixels_per_cell == (4, 4) and model.encoder.conv_in.in_channels == 12
    codes = model.encode(images)
    assert codes.shape == (2, 2, 2, 3) and model.decode(codes).shape == images.shape
    with pytest.raises(StudioError, match="multiples of 4"):
        model.encode(images[..., :6])


@torch.no_grad()
def test_the_first_levels_are_an_image():
    model = tiny()
    codes = model.encode(torch.rand(1, 3, 8, 8))
    for depth in (1, 2, 3):
        part = model.decode(codes, depth=depth)
        torch.testing.assert_close(part, model.decode(codes[..., :depth]))
        hidden = codes.clone()
        hidden[..., depth:] = -1
        torch.testing.assert_close(part, model.decode(hidden))
    for wrong in (0, 4):
        with pytest.raises(StudioError, match="from 1 to 3"):
            model.decode(codes, depth=wrong)
    with pytest.raises(StudioError, match="3 levels"):
        model.decode(codes.repeat(1, 1, 1, 2))


@pytest.mark.parametrize("more", [{}, {"shared_codebook": False, "codebook_size": (16, 8, 4), "cell": (2, 1)}])
@torch.no_grad()
def test_save_and_load(tmp_path, more):
    model, images = tiny(**more), torch.rand(1, 3, 16, 8)
    model.save_pretrained(tmp_path)
    loaded = RVQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert loaded.bits_per_token == (3.0 if more else 4.0) and loaded.bits_of_stack(2) == (7.0 if more else 8.0)


def test_refuses_what_does_not_fit():
    with pytest.raises(StudioError, match="one codebook size or 3"):
        tiny(codebook_size=(4, 4))
    with pytest.raises(StudioError, match="shared codebook has one size"):
        tiny(codebook_size=(4, 4, 8))
    with pytest.raises(StudioError, match="multiple of norm_groups"):
        tiny(base_channels=6)
    with pytest.raises(StudioError, match="multiples of 4 and 2"):
        tiny(cell=(2, 1)).encode(torch.zeros(1, 3, 6, 6))
    with pytest.raises(StudioError, match="Images must be"):
        tiny().encode(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("cell", [(1, 1), (2, 3), (3, 1)])
def test_space_to_depth_and_back(cell):
    features = torch.randn(2, 5, 6, 6)
    folded = space_to_depth(features, cell)
    assert folded.shape == (2, 6 // cell[0], 6 // cell[1], 5 * cell[0] * cell[1])
    torch.testing.assert_close(folded[0, 0, 0, :5], features[0, :, 0, 0])
    assert torch.equal(depth_to_space(folded, cell), features)


def test_a_prefix_does_not_depend_on_deeper_codebooks():
    one, other, z = quantizer(), quantizer(), vectors(20)
    torch.nn.init.normal_(other.codebooks[2].weight)
    assert torch.equal(one.encode(z)[:, :2], other.encode(z)[:, :2])
    assert not torch.equal(one.encode(z)[:, 2], other.encode(z)[:, 2])


def test_codes_round_trip_when_deeper_levels_are_fine():
    model = quantizer()
    for level, table in enumerate(model.codebooks):
        table.weight *= 0.02**level
    codes = torch.stack([torch.randint(len(table), (50,)) for table in model.tables], dim=-1)
    assert torch.equal(model.encode(model.lookup(codes).sum(dim=-2)), codes)


def test_residuals_shrink_when_every_codebook_has_the_zero_vector():
    model, z = quantizer(), vectors(100)
    for table in model.codebooks:
        table.weight[0] = 0
    rest = (z[:, None] - model.lookup(model.encode(z)).cumsum(dim=1)).norm(dim=-1)
    assert (torch.cat((z.norm(dim=-1)[:, None], rest), dim=1).diff(dim=1) <= 1e-6).all()


def test_the_chain_starts_at_any_level():
    model, z = quantizer(), vectors(30)
    codes = model.encode(z)
    levels = model.lookup(codes)
    first = torch.arange(30) % 4
    known = torch.arange(3) < first[:, None]
    rest = z - (levels * known[..., None]).sum(dim=1)
    assert torch.equal(model.encode(rest, first=first), torch.where(known, -1, codes))
    assert torch.equal(model.encode(z - levels[:, 0], first=1)[:, 1:], codes[:, 1:])
    assert not model.lookup(torch.full((1, 3), -1)).any()


def test_gradients_pass_and_pull_towards_every_partial_sum():
    model, z = quantizer(), vectors(4, 6).requires_grad_()
    quantized = model(z)
    (through,) = torch.autograd.grad(quantized.vectors.sum(), z, retain_graph=True)
    assert torch.equal(through, torch.ones_like(z))
    (pull,) = torch.autograd.grad(quantized.commitment, z)
    sums = model.lookup(quantized.codes).cumsum(dim=-2)
    torch.testing.assert_close(pull, (2 * (z[..., None, :] - sums) / z.numel()).mean(dim=-2))
    assert not any(table.requires_grad for table in model.parameters())


def test_many_vectors_are_compared_in_parts(monkeypatch):
    table, z = torch.randn(11, 5), vectors(3, 7)
    expected = torch.cdist(z, table).argmin(dim=-1)
    monkeypatch.setattr(residual_quantizer, "_DISTANCES_AT_ONCE", 25)
    assert torch.equal(nearest(z, table), expected)


def test_soft_codes():
    model, z = quantizer((8, 8, 8), shared=True), vectors(2, 50)
    distribution, codes = soft_codes(model, z, 0.5)
    torch.testing.assert_close(distribution.sum(dim=-1), torch.ones(2, 50, 3))
    assert torch.equal(distribution.argmax(dim=-1), codes) and torch.equal(codes, model.encode(z))
    distribution, sampled = soft_codes(model, z, 0.5, torch.Generator().manual_seed(0))
    assert not torch.equal(sampled, codes)
    rest = z - model.tables[0][sampled[..., 0]]
    distances = (rest[..., None, :] - model.tables[1]).square().sum(dim=-1)
    torch.testing.assert_close(distribution[..., 1, :], (-distances / 0.5).softmax(dim=-1))


def test_without_memory_a_codebook_is_the_mean_of_its_vectors():
    model, z = quantizer((4,)), vectors(200)
    averages = CodebookAverages(model.tables[0], decay=0.0, eps=0.0)
    codes = learn_codebooks(model, [averages], z, candidates=None).codes[:, 0]
    for code in codes.unique():
        torch.testing.assert_close(model.tables[0][code], z[codes == code].mean(dim=0))


def test_unused_codes_start_anew_from_the_batch():
    model, z = quantizer((6, 6), shared=True), vectors(3, 20)
    quantized = learn_codebooks(model, [CodebookAverages(model.tables[0], decay=0.99)], z)
    assert quantized.vectors.shape == z.shape and quantized.codes.shape == (3, 20, 2)
    few = vectors(4)
    sampled = restart_candidates(few, 10, torch.Generator().manual_seed(0))
    assert sampled.shape == (10, 5)
    assert torch.cdist(sampled, few).min(dim=1).values.max() <= 0.01


def test_learning_lowers_the_error():
    model, z = quantizer((16, 16), shared=True), vectors(400)
    averages = [CodebookAverages(model.tables[0], decay=0.8)]
    torch.manual_seed(0)
    losses = [F.mse_loss(learn_codebooks(model, averages, z).vectors, z) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
