"""The KL tokenizer: what it adds to diffusers' autoencoder, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import studio
from studio import StudioError
from studio.tokenizers.kl import KLTokenizer

SIZES = {
    "in_channels": 12, "out_channels": 12, "down_block_types": ["DownEncoderBlock2D"] * 2, "sample_size": 8,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [8, 16], "layers_per_block": 1,
    "latent_channels": 3, "norm_num_groups": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return KLTokenizer(SIZES, 2, scaling_factor=0.5, sample_size=16).eval()


@torch.no_grad()
def test_folds_pixels_around_the_autoencoder_of_diffusers(tokenizer):
    assert (tokenizer.downsample_factor, tokenizer.latent_channels) == (4, 3)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    plain = tokenizer.network
    folded = images.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    expected = plain.encode(folded).latent_dist
    latents = tokenizer.encode(images)
    assert torch.equal(latents, expected.mean) and latents.shape == (2, 3, 4, 4)
    assert torch.equal(tokenizer.encode_distribution(images).std, expected.std)
    assert torch.equal(tokenizer.decode(latents), F.pixel_shuffle(plain.decode(latents).sample, 2))
    assert tokenizer(images).shape == images.shape


@torch.no_grad()
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = studio.load(tmp_path, device="cpu").to(memory_format=torch.contiguous_format)  # the order of sums here
    images = torch.rand(1, 3, 16, 16)
    assert isinstance(loaded, KLTokenizer) and loaded.config.scaling_factor == 0.5
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


@torch.no_grad()
def test_an_autoencoder_of_diffusers_becomes_one():
    torch.manual_seed(1)
    plain = AutoencoderKL(**{**SIZES, "in_channels": 3, "out_channels": 3, "scaling_factor": 0.3}).eval()
    tokenizer = KLTokenizer.from_autoencoder(plain)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(tokenizer.encode(images), plain.encode(images).latent_dist.mean)
    assert tokenizer.config.scaling_factor == 0.3 and tokenizer.config.sample_size == 8
    again = KLTokenizer(**{n: v for n, v in tokenizer.config.items() if not n.startswith("_")})
    again.load_state_dict(tokenizer.state_dict())
    assert torch.equal(again.encode(images), tokenizer.encode(images))


@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 14, 16), (3, 16, 16), (1, 4, 16, 16)])
def test_images_that_do_not_fit_are_refused(tokenizer, shape):
    with pytest.raises(StudioError, match="must be"):
        tokenizer.encode(torch.zeros(shape))
