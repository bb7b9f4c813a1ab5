"""KL tokenizer: a variational autoencoder whose latents are the continuous tokens of MAR.

The network is diffusers' `AutoencoderKL` ("High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv:2112.10752, section 3.1), in the component `network`. Our addition: pixels can be folded into channels
first, so that a small network does not work at full resolution.

Scope: encoding and decoding. `studio.training.kl` trains; the generator cuts latents into tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin

from studio.errors import StudioError


class KLTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encodes images to a grid of latents and decodes them.

    Args:
        autoencoder: arguments of diffusers' `AutoencoderKL`, with its defaults; its channels: those of folded images.
        pixel_unshuffle: side of the pixel blocks folded into channels before the first convolution (1: none).
        scaling_factor: factor that gives latents a standard deviation of about 1; `encode` and `decode` ignore it.
        sample_size: side in pixels that the weights were trained for.
    """

    config: Any

    _no_split_modules = ["ResnetBlock2D"]  # type: ignore[assignment]  # None in diffusers

    @register_to_config
    def __init__(
        self,
        autoencoder: dict | None = None,
        pixel_unshuffle: int = 1,
        scaling_factor: float = 0.2325,
        sample_size: int = 256,
    ):
        super().__init__()
        self.network = AutoencoderKL(**(autoencoder or {}))

    @classmethod
    def from_autoencoder(cls, autoencoder: AutoencoderKL) -> "KLTokenizer":
        """A tokenizer around this network, which is not copied."""
        sizes = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            tokenizer = cls(sizes, 1, sizes["scaling_factor"], sizes["sample_size"])
        tokenizer.network = autoencoder
        return tokenizer

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one cell of the grid."""
        return self.config.pixel_unshuffle * 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""
        return self.network.config.latent_channels

    def encode_distribution(self, images: torch.Tensor) -> DiagonalGaussianDistribution:
        """Gaussian distributions over latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        Raises:
            StudioError: images whose shape does not fit.
        """
        factor, channels = self.downsample_factor, self.network.config.in_channels // self.config.pixel_unshuffle**2
        if images.ndim != 4 or images.shape[1] != channels:
            raise StudioError(f"Images must be (B, {channels}, H, W); got {tuple(images.shape)}.")
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise StudioError(f"Height and width must be multiples of {factor}; got {tuple(images.shape[-2:])}.")
        return self.network.encode(F.pixel_unshuffle(images, self.config.pixel_unshuffle)).latent_dist

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w), the means of the distributions, of images (B, 3, H, W) in [-1, 1]."""
        return self.encode_distribution(images).mode()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w)."""
        return F.pixel_shuffle(self.network.decode(latents).sample, self.config.pixel_unshuffle)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstruction of images (B, 3, H, W) in [-1, 1] through their latents."""
        return self.decode(self.encode(images))
