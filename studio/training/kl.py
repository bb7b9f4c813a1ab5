"""KL autoencoder (arXiv:2112.10752): diffusers' `AutoencoderKL`, whose latents are continuous tokens.

Where the options name a trained VQ tokenizer (`--init-from` of the kind vq), encoder and decoder start from its blocks.
With `same_tokens_as` in [model], latents stay those of a smaller KL tokenizer (`studio.training.same_tokens`).
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.checkpoints.loading import load_model
from studio.tokenizers.kl import KLTokenizer
from studio.training.export import save_bf16
from studio.training.from_vq import is_vq, start_kl
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, TokenizerRecipe, downsampling
from studio.training.same_tokens import SameTokens, check_reference, start_coarse
from studio.training.vq import reconstruction_loss

KL_WEIGHT = 3e-3
"""Of the divergence of a latent number from a standard Gaussian, in nats. It gives latents a width, below which nothing
has to be sampled, and empties the channels that restore little."""
MEASURED = 512
"""Images whose latents say what the scaling factor is."""


class TrainableKL(nn.Module):
    """A `KLTokenizer` with its loss."""

    def __init__(self, tokenizer: KLTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstruction and divergence of images (B, 3, H, W) in [-1, 1]."""
        latents = self.tokenizer.encode_distribution(images)
        restored = self.tokenizer.decode(latents.sample()).float()
        divergence = latents.kl().mean() / latents.mean[0].numel()
        return reconstruction_loss(restored, images) + KL_WEIGHT * divergence


class SameLatents(SameTokens):
    """A `KLTokenizer` that learns the distributions of another's latents, and to restore from samples of them."""

    def tokens_of(self, images: torch.Tensor, choices: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.reference.encode_distribution(images)
        return latents.parameters, latents.sample()

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode_distribution(images).parameters

    def restoration(self, fed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return reconstruction_loss(self.tokenizer.decode(fed).float(), images)


class KLRecipe(TokenizerRecipe):
    """An image tokenizer of continuous tokens."""

    kind = "kl"
    purpose = "Turns an image into a grid of continuous tokens and back."
    task = "image-tokenizer"
    defaults = Defaults(steps=4000, batch_size=32, learning_rate=3e-3)
    takes = frozenset({"size", "grid", "dim", "layers"})
    model = {"latent_channels": 16, "same_tokens_as": ""}

    def build(self) -> torch.nn.Module:
        options = self.options
        size = options.size or 128
        grid = options.grid or size // 8
        folded, halvings = downsampling(size, grid)
        levels, channels, reference = halvings + 1, self.model["latent_channels"], None
        if name := self.model["same_tokens_as"]:
            reference = load_model(KLTokenizer, self.find(name), torch.float32)
            check_reference(reference, size, grid)
            channels = reference.latent_channels
        self.open(size)
        autoencoder = {
            "in_channels": 3 * folded**2,
            "out_channels": 3 * folded**2,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": [options.dim or 96] * levels,
            "layers_per_block": options.layers or 2,
            "latent_channels": channels,
            "sample_size": size // folded,
        }
        tokenizer = KLTokenizer(autoencoder, folded, scaling_factor=1.0, sample_size=size)
        module: nn.Module = TrainableKL(tokenizer)
        if reference is not None:
            module = SameLatents(tokenizer, reference)
            start_coarse(tokenizer.network, reference.network)
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its types

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        network = module.tokenizer.network
        return muon_and_adamw(module, hidden_matrices(network.encoder, network.decoder), learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        return {"images": self.images(rng, size, training).contiguous(memory_format=torch.channels_last)}

    def load(self, module: Any, folder: Path) -> None:
        if is_vq(folder):
            start_kl(module.tokenizer.network, folder)
            if isinstance(module, SameTokens):
                start_coarse(module.tokenizer.network, module.reference.network)
        else:
            super().load(module, folder)

    def export(self, module: Any, folder: Path) -> None:
        tokenizer = copy.deepcopy(module.tokenizer)
        same = isinstance(module, SameTokens)
        scaling_factor = module.reference.config.scaling_factor if same else 1 / self.spread(tokenizer)
        tokenizer.register_to_config(scaling_factor=scaling_factor)
        save_bf16(tokenizer, folder)

    @torch.no_grad()
    def spread(self, tokenizer: KLTokenizer) -> float:
        """The standard deviation of latents, over training images."""
        images = self.source.augmented(np.random.default_rng(0), MEASURED)
        parts = [tokenizer.encode_distribution(part.to(tokenizer.device)) for part in images.split(64)]
        means, variances = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "var"))
        return float((means.var() + variances.mean()).sqrt())
