"""VQ tokenizer (VQGAN's architecture as in LlamaGen, arXiv:2406.06525, section 3.1): convolutions around one codebook.

The codebook follows the encoder by exponential averages (arXiv:1711.00937, appendix A.1) over cosine codes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.tokenizers.vq import VQTokenizer
from studio.training.recipe import Defaults, downsampling
from studio.training.robust_decoder import TunableRecipe

CONTEXT_WEIGHT = 4


class TrainableVQ(nn.Module):
    """A VQTokenizer with its losses; dead codes are revived."""

    def __init__(self, config: dict):
        super().__init__()
        self.tokenizer = VQTokenizer(**config)
        self.tokenizer.quantize.requires_grad_(False)
        self.quantizer = VectorQuantize(
            dim=config["code_dim"], codebook_size=config["codebook_size"], use_cosine_sim=True, decay=0.99,
            kmeans_init=False, threshold_ema_dead_code=0.2, commitment_weight=0.25, accept_image_fmap=True,
        )  # fmt: skip

    def forward(self, images: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Loss of images (B, 3, H, W) in [-1, 1]: reconstruction, commitment, and tokens that depend on their own cell.

        The first n images are also encoded with some cells exchanged for their neighbour's, where `cells` (n, h, w)
        is false. What a cell becomes should not change with its surroundings: a token that encodes other cells makes
        the reconstruction better, but is hard to predict for a generator.
        """
        own = images[: len(cells)]
        kept = cells.repeat_interleave(self.tokenizer.downsample_factor, 1)
        kept = kept.repeat_interleave(self.tokenizer.downsample_factor, 2)[:, None]
        mixed = torch.where(kept, own, own.roll(1, 0)).contiguous(memory_format=torch.channels_last)
        features = self.tokenizer.encode_features(torch.cat((images, mixed))).float()
        features, of_mixed = features[: len(images)], features[len(images) :]
        of_own = features[: len(cells)]
        expected = torch.where(cells[:, None], of_own, of_own.roll(1, 0))
        quantized, _, commitment = self.quantizer(features)
        restored = self.tokenizer.decode_features(quantized).float()
        context = 1 - F.cosine_similarity(of_mixed, expected, dim=1).mean()
        return reconstruction_loss(restored, images) + commitment.sum() + CONTEXT_WEIGHT * context


def reconstruction_loss(restored: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error, the same for differences of neighbours, and each image's root mean squared error.

    The last term weighs every image about alike, as a mean of per-image PSNR does.
    """
    error = restored - images
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    rmse = (error.square().mean(dim=(1, 2, 3)) + 1e-5).sqrt().mean()
    return 0.5 * error.abs().mean() + 0.5 * edges + rmse


class VQRecipe(TunableRecipe):
    """An image tokenizer of one code a cell."""

    kind = "vq"
    purpose = "Turns an image into a grid of discrete tokens and back."
    task = "image-tokenizer"
    defaults = Defaults(steps=4000, batch_size=32, learning_rate=3e-3)
    takes = frozenset({"size", "grid", "codes", "dim", "layers"})
    model = {**TunableRecipe.model, "code_dim": 8, "z_channels": 192, "decoder_layers": None}
    tokenizer_class = VQTokenizer
    loss = staticmethod(reconstruction_loss)

    def network(self) -> torch.nn.Module:
        options = self.options
        size = options.size or 128
        self.grid = options.grid or size // 8
        folded, halvings = downsampling(size, self.grid)
        layers = options.layers or 2
        self.open(size)
        return TrainableVQ({
            "base_channels": options.dim or 96,
            "channel_multipliers": (1,) * (halvings + 1),
            "encoder_res_blocks": layers,
            "decoder_res_blocks": self.model["decoder_layers"] or layers + 1,
            "z_channels": self.model["z_channels"],
            "code_dim": self.model["code_dim"],
            "codebook_size": options.codes or 4096,
            "pixel_unshuffle": folded,
            "sample_size": size,
        })  # fmt: skip

    def choices(self, rng: np.random.Generator, size: int, training: bool) -> dict[str, torch.Tensor]:
        if self.tunes_decoder:
            return {}
        return {"cells": torch.from_numpy(rectangles(rng, max(1, size // 2), self.grid))}


def rectangles(rng: np.random.Generator, n: int, side: int) -> np.ndarray:
    """Masks (n, side, side), bool, of a random rectangle each, at least one cell and never all of them."""
    height, width = rng.integers(1, side + 1, size=(2, n))
    height = np.where((height == side) & (width == side), side - 1, height)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    place = np.arange(side)
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None, :]
