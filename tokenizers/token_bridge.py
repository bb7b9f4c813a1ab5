"""TokenBridge tokenizer: the latents of a frozen variational autoencoder, each number quantised on its own.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.2. Nothing
is trained: any `KLTokenizer` becomes a tokenizer of discrete tokens, 16 a cell with MAR's KL-16.

Deviations from the authors' code: `encode` takes the mean of a latent unless a generator is given to sample with; the
order of dimensions is theirs for MAR's autoencoder and is measured for others (`low_frequency_order`), because they
publish the order but not the cutoff frequency.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from studio.checks import check_integer, shown
from studio.errors import StudioError
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.scalar_quantizer import ScalarQuantizer, normal_levels

MAX_LEVELS = 2**16

KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The authors' order for the dimensions of MAR's KL-16: the first is sampled first."""


def low_frequency_order(latents: torch.Tensor, cutoff: float = 0.25) -> list[int]:
    """Dimensions of latents by their fraction of energy in low frequencies, the largest first.

    Args:
        latents: (n, C, h, w), of images of the kind that will be sampled.
        cutoff: magnitude in cycles per cell below which a frequency is low, above 0; the highest along an axis is 0.5.

    Raises:
        StudioError: a cutoff that is not above 0.
    """
    if not cutoff > 0:
        raise StudioError(f"cutoff must be above 0, not {shown(cutoff)}.")
    energy = torch.fft.fft2(latents.float()).abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=latents.device) for side in latents.shape[-2:])
    low = (rows[:, None].square() + columns.square()).sqrt() < cutoff
    shares = (energy * low).sum(dim=(2, 3)) / energy.sum(dim=(2, 3)).clamp_min(torch.finfo(energy.dtype).tiny)
    return shares.mean(dim=0).argsort(descending=True, stable=True).tolist()


class TokenBridgeTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encodes images to a grid of C level indices a cell and decodes them.

    Args:
        autoencoder: arguments of the `KLTokenizer` in the component `continuous`, without its `sample_size`.
        levels: number of levels B of every dimension.
        value_range: scaled latents at the ends of the axis; latents outside take the outermost levels.
        std_range: where the Gaussian of the levels is truncated.
        reconstruction_values: positions of the levels (B,) from -`std_range` to `std_range`; computed when None.
        dimension_order: order in which a generator samples the C dimensions, a permutation; 0 to C - 1 when None.
        sample_size: side in pixels that the weights were trained for.

    Raises:
        StudioError: fewer than two levels, another number of values, or an order that is not a permutation.
    """

    config: Any

    _no_split_modules = ["ResnetBlock2D"]  # type: ignore[assignment]  # None in diffusers
    OF_LEVELS = ("levels", "value_range", "std_range", "reconstruction_values", "dimension_order", "sample_size")
    """Keys of its configuration besides those of the autoencoder."""

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
        low, high = value_range
        self.quantizer = ScalarQuantizer(values, (low, high), std_range)

    @classmethod
    def from_autoencoder(cls, autoencoder: KLTokenizer, **options: Any) -> "TokenBridgeTokenizer":
        """A tokenizer around this network, which is not copied; `options` are arguments of the class."""
        sizes = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            tokenizer = cls(sizes, **{"sample_size": sizes.pop("sample_size"), **options})
        tokenizer.continuous = autoencoder
        return tokenizer.train(autoencoder.training)

    def with_levels(self, levels: int) -> "TokenBridgeTokenizer":
        """A tokenizer with the same network and order and another number of levels."""
        kept = {name: self.config[name] for name in self.OF_LEVELS}
        return self.from_autoencoder(self.continuous, **{**kept, "levels": levels, "reconstruction_values": None})

    @property
    def dimensions(self) -> int:
        """Tokens of a cell C."""
        return self.continuous.latent_channels

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one cell."""
        return self.continuous.downsample_factor

    @property
    def bits_per_token(self) -> float:
        """Bits of a level index, log2 B."""
        return math.log2(self.config.levels)

    @property
    def level_values(self) -> torch.Tensor:
        """The scaled latent of each level, (B,) float32."""
        return self.quantizer.values(self.device)

    def encode_features(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w): means, or samples with a generator.

        Raises:
            StudioError: images whose shape does not fit.
        """
        distribution = self.continuous.encode_distribution(images)
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        return latents * self.continuous.config.scaling_factor

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to level indices (B, h, w, C), int64, in the autoencoder's order."""
        return self.quantizer.encode(self.encode_features(images, generator)).movedim(1, -1)

    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1]."""
        return self.continuous.decode((latents / self.continuous.config.scaling_factor).to(self.dtype))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Level indices (B, h, w, C) to images (B, 3, H, W), about [-1, 1]."""
        return self.decode_features(self.quantizer.decode(tokens).movedim(-1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstruction of images (B, 3, H, W) in [-1, 1] from their tokens."""
        return self.decode(self.encode(images))
