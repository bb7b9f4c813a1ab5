"""Levels for single numbers, and the tokenizer around a continuous autoencoder."""

import pytest
import torch

import studio
from studio import StudioError, TokenBridgeTokenizer
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.scalar_quantizer import ScalarQuantizer, normal_levels
from studio.tokenizers.token_bridge import KL16_ORDER, low_frequency_order

SIZES = {
    "autoencoder": {
        "in_channels": 12, "out_channels": 12, "block_out_channels": [8, 8], "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 3, "norm_num_groups": 4, "sample_size": 8,
    },
    "pixel_unshuffle": 2,
    "scaling_factor": 2.0,
}  # fmt: skip


def tiny(**more):
    torch.manual_seed(0)
    return TokenBridgeTokenizer(**{"autoencoder": SIZES, "sample_size": 16, **more}).eval()


def quantizer(levels):
    return ScalarQuantizer(normal_levels(levels, 3.0), (-5.0, 5.0), 3.0)


@pytest.mark.parametrize("levels", [2, 7, 16, 64])
def test_levels(levels):
    ours, numbers = quantizer(levels), torch.linspace(-6, 6, 4001)
    tokens, values = ours.encode(numbers), ours.values()
    nearest = (ours.place(numbers)[:, None] - torch.tensor(normal_levels(levels, 3.0))).abs().argmin(dim=1)
    assert torch.equal(tokens, nearest) and tokens.unique().tolist() == list(range(levels))
    assert (tokens.diff() >= 0).all()
    assert torch.equal(ours.encode(values), torch.arange(levels))
    torch.testing.assert_close(values, -values.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.decode(tokens), values[tokens])


def test_levels_are_the_means_of_equal_shares():
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = numbers[numbers.abs() < 3].sort().values
    shares = torch.special.ndtr(numbers)
    for level, expected in enumerate(normal_levels(8, 3.0)):
        within = (shares >= level / 8) & (shares < (level + 1) / 8)
        assert float(numbers[within].mean()) == pytest.approx(expected, abs=0.01)


def test_error_bounds():
    ours, edge = quantizer(64), 4.0618
    assert float(ours.values().max()) == pytest.approx(edge, abs=1e-4)

    def worst(low, high):
        numbers = torch.linspace(low, high, 20_001)
        return float((numbers - ours.decode(ours.encode(numbers))).abs().max())

    assert worst(-edge, edge) == pytest.approx(0.3690, abs=1e-3)
    assert worst(-5, 5) == pytest.approx(0.9382, abs=1e-3)
    assert worst(5, 50) == pytest.approx(50 - edge, abs=1e-3)
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for levels, error in ((16, 1.03e-2), (32, 2.63e-3), (64, 6.6e-4)):
        of_levels = quantizer(levels)
        found = float((numbers - of_levels.decode(of_levels.encode(numbers))).square().mean())
        assert found == pytest.approx(error, rel=0.05)


def test_a_tie_takes_the_lower_level():
    ours = ScalarQuantizer([-1.0, 0.0, 1.0], (-2.0, 2.0), 2.0)
    assert ours.encode(torch.tensor([-0.5, -0.49, 0.5, 0.51])).tolist() == [0, 1, 1, 2]


@torch.no_grad()
def test_images_to_tokens_and_back():
    model, images = tiny(), torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, 4, 4, 3) and tokens.dtype == torch.int64 and model.bits_per_token == 6
    latents = 2.0 * model.continuous.encode(images)
    torch.testing.assert_close(model.encode_features(images), latents)
    values = model.level_values[tokens].movedim(-1, 1)
    assert (values - latents).abs().max() < 0.4
    torch.testing.assert_close(model.decode(tokens), model.continuous.decode(values / 2.0))
    torch.testing.assert_close(model(images), model.decode(tokens))
    sampled = [model.encode(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


@torch.no_grad()
def test_levels_can_be_changed_and_the_network_stays():
    model = tiny(dimension_order=(2, 0, 1))
    fine, images = model.with_levels(256), torch.rand(1, 3, 16, 16)
    assert fine.continuous is model.continuous and fine.config.dimension_order == [2, 0, 1]
    errors = [
        float((each.encode_features(images) - each.quantizer.decode(each.encode(images)).movedim(-1, 1)).abs().mean())
        for each in (model.with_levels(8), model, fine)
    ]
    assert errors == sorted(errors, reverse=True)
    around = TokenBridgeTokenizer.from_autoencoder(KLTokenizer(**SIZES), levels=16)
    assert around.config.levels == 16 and around.encode(images).max() < 16


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded(tmp_path, dtype):
    values = [-2.0, -0.5, 0.25, 2.5]
    model = tiny(levels=4, reconstruction_values=values, dimension_order=(1, 0, 2))
    model.save_pretrained(tmp_path)
    loaded, images = studio.load(tmp_path, device="cpu", dtype=dtype), torch.rand(1, 3, 16, 16)
    assert isinstance(loaded, TokenBridgeTokenizer) and loaded.config.dimension_order == [1, 0, 2]
    assert loaded.level_values.dtype == torch.float32 and torch.equal(loaded.level_values, model.level_values)
    tokens = loaded.encode(images.to(loaded.dtype))
    assert loaded.decode(tokens).dtype == loaded.dtype
    if dtype == "float32":
        loaded.to(memory_format=torch.contiguous_format)  # the order of sums of the other one
        assert torch.equal(tokens, model.encode(images)) and torch.equal(loaded.decode(tokens), model.decode(tokens))


def test_dimensions_are_ordered_by_low_frequencies():
    grid = torch.arange(8.0)
    waves = [torch.cos(2 * torch.pi * cycles * grid / 8).expand(8, 8) for cycles in (3, 0, 2)]
    waves.append(waves[0] + 0.5 * waves[1])
    latents = torch.stack(waves).expand(5, -1, -1, -1) * torch.rand(5, 4, 1, 1)
    assert low_frequency_order(latents) == [1, 3, 0, 2]
    assert low_frequency_order(latents, cutoff=0.3) == [1, 2, 3, 0]
    assert sorted(KL16_ORDER) == list(range(16))


def test_refuses_what_does_not_fit():
    with pytest.raises(StudioError, match="levels must be a whole number from 2"):
        tiny(levels=1)
    with pytest.raises(StudioError, match="4 reconstruction values; 3"):
        tiny(levels=4, reconstruction_values=[0.0, 1.0, 2.0])
    with pytest.raises(StudioError, match="each above"):
        tiny(levels=2, reconstruction_values=[1.0, 0.0])
    with pytest.raises(StudioError, match="each of 0 to 2 once"):
        tiny(dimension_order=(0, 0, 1))
    with pytest.raises(StudioError, match="low to high"):
        tiny(value_range=(1.0, -1.0))
    with pytest.raises(StudioError, match="multiples of 4"):
        tiny().encode(torch.zeros(1, 3, 6, 6))
    with pytest.raises(StudioError, match="cutoff"):
        low_frequency_order(torch.zeros(1, 2, 4, 4), cutoff=0)
