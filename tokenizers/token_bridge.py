"""TokenBridge tokenizer: the latents of a frozen variational autoencoder, each number quantised on its own.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.2. Nothing
is trained: any `KLTokenizer` becomes a tokenizer of discrete tokens, 16 of them a cell with MAR's KL-16.

Deviations from the authors' code: `encode` takes the mean of a latent unless it is given a generator to sample with;
the order of dimensions is theirs for MAR's autoencoder only and is measured for others (`low_frequency_order`), because
they publish the list but not how low a frequency is.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from studio.checks import check_integer
from studio.errors import StudioError
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.scalar_quantizer import ScalarQuantizer, normal_levels

MAX_LEVELS = 2**16

KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The authors' order for the dimensions of MAR's KL-16: the first is sampled first."""


def low_frequency_order(latents: torch.Tensor, cutoff: float = 0.25) -> list[int]:
    """Dimensions of latents (n, C, h, w) by their share of energy in low frequencies, the greatest first.

    Args:
        latents: of images of the kind that will be sampled.
        cutoff: length, in cycles per cell, below which a frequency is low; the highest along an axis is 0.5.

    Errors: `StudioError` for a cutoff that is not above 0.
    """
    if not cutoff > 0:
        raise StudioError(f"cutoff must be above 0, not {cutoff!r}.")
    energy = torch.fft.fft2(latents.float()).abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=latents.device) for side in latents.shape[-2:])
    low = (rows[:, None].square() + columns.square()).sqrt() < cutoff
    shares = (energy * low).sum(dim=(2, 3)) / energy.sum(dim=(2, 3)).clamp_min(torch.finfo(energy.dtype).tiny)
    return shares.mean(dim=0).argsort(descending=True, stable=True).tolist()


class TokenBridgeTokenizer(ModelMixin, ConfigMixin):
    """Images to a grid of C level numbers a cell and back.

    Args:
        autoencoder: arguments of the `KLTokenizer` in the part `continuous`, but for its `sample_size`.
        levels: numbers of levels B of every dimension.
        value_range: scaled latents at the ends of the axis; those outside take the outermost levels.
        std_range: where the Gaussian that the levels are laid for is cut off.
        reconstruction_values: places of the levels (B,) from -`std_range` to `std_range`; computed when None.
        dimension_order: a permutation of the C dimensions, in which a generator samples them; as they are when None.
        sample_size: side in pixels that the weights were trained for.

    Errors: `StudioError` for levels that are fewer than two or other than their values, and for an order that is no
    permutation.
    """

    _no_split_modules = ["ResnetBlock2D"]
    OF_LEVELS = ("levels", "value_range", "std_range", "reconstruction_values", "dimension_order", "sample_size")
    """What its configuration says beside that of the autoencoder."""

    @register_to_config
    def __init__(
        self,
        autoencoder: dict | None = None,
        levels: int = 64,
        value_range: tuple[float, float] = (-5.0, 5.0),
        std_range: float = 3.0,
        reconstruction_values: Sequence[float] | None = None,
        dimension_order: Sequence[int] | None = None,
        sample_size: int = 256,
    ):
        super().__init__()
        self.continuous = KLTokenizer(**{**(autoencoder or {}), "sample_size": sample_size})
        levels = check_integer("levels", levels, 2, MAX_LEVELS)
        values = normal_levels(levels, std_range) if reconstruction_values is None else list(reconstruction_values)
        if len(values) != levels:
            raise StudioError(f"{levels} levels need {levels} reconstruction values; {len(values)} were given.")
        order = list(range(self.dimensions)) if dimension_order is None else list(dimension_order)
        if sorted(order) != list(range(self.dimensions)):
            raise StudioError(f"dimension_order must hold each of 0 to {self.dimensions - 1} once, not {order}.")
        self.register_to_config(reconstruction_values=values, dimension_order=order)
        self.quantizer = ScalarQuantizer(values, tuple(value_range), std_range)

    @classmethod
    def from_autoencoder(cls, autoencoder: KLTokenizer, **options) -> "TokenBridgeTokenizer":
        """A tokenizer around this very network, which is not copied; `options` are those of the class."""
        sizes = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            tokenizer = cls(sizes, **{"sample_size": sizes.pop("sample_size"), **options})
        tokenizer.continuous = autoencoder
        return tokenizer.train(autoencoder.training)

    def with_levels(self, levels: int) -> "TokenBridgeTokenizer":
        """The same network and order with another number of levels."""
        kept = {name: self.config[name] for name in self.OF_LEVELS}
        return self.from_autoencoder(self.continuous, **{**kept, "levels": levels, "reconstruction_values": None})

    @property
    def dimensions(self) -> int:
        """Tokens of a cell C."""
        return self.continuous.latent_channels

    @property
    def downsample_factor(self) -> int:
        """Pixels a side that one cell stands for."""
        return self.continuous.downsample_factor

    @property
    def bits_per_token(self) -> float:
        """Bits that name one level, log2 B."""
        return math.log2(self.config.levels)

    @property
    def level_values(self) -> torch.Tensor:
        """The scaled latent that each level stands for, (B,) float32."""
        return self.quantizer.values(self.device)

    def encode_features(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w): means, or samples with a generator.

        Errors: `StudioError` for images whose shape does not fit.
        """
        distribution = self.continuous.encode_distribution(images)
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        return latents * self.continuous.config.scaling_factor

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to level numbers (B, h, w, C), int64, in the autoencoder's order."""
        return self.quantizer.encode(self.encode_features(images, generator)).movedim(1, -1)

    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1]."""
        return self.continuous.decode((latents / self.continuous.config.scaling_factor).to(self.dtype))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Level numbers (B, h, w, C) to images (B, 3, H, W), about [-1, 1]."""
        return self.decode_features(self.quantizer.decode(tokens).movedim(-1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Restoration of images (B, 3, H, W) in [-1, 1] from their tokens."""
        return self.decode(self.encode(images))
