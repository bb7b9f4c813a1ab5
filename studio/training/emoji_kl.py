"""Recipe of `emoji-kl`, whose encoder and decoder start from the blocks that they share with those of `emoji-vq`."""

import copy

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from studio.data.archive import load_pictures
from studio.data.splits import concepts
from studio.tokenizers.kl import KLTokenizer
from studio.training.emoji_vq import random_pictures, reconstruction_loss
from studio.training.export import save_bf16
from studio.training.from_vq import start_kl
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

SIDE = 64
UNSHUFFLE = 4
AUTOENCODER = {
    "in_channels": 3 * UNSHUFFLE**2,
    "out_channels": 3 * UNSHUFFLE**2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [96, 96],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": SIDE // UNSHUFFLE,
}
KL_WEIGHT = 3e-3
"""Of the divergence of a latent number from a standard Gaussian, in nats. It gives latents a width, below which nothing
has to be drawn, and empties the channels that restore little."""
MEASURED = 512
"""Pictures whose latents say what the scaling factor is."""


class TrainableKL(nn.Module):
    """A `KLTokenizer` with its loss."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images):
        """Restoration and divergence of pictures (B, 3, H, W) in [-1, 1]."""
        latents = self.tokenizer.encode_distribution(images)
        restored = self.tokenizer.decode(latents.sample()).float()
        divergence = latents.kl().mean() / latents.mean[0].numel()
        return reconstruction_loss(restored, images) + KL_WEIGHT * divergence


class EmojiKL(Recipe):
    """Turns a 64 px picture into an 8x8 grid of 16 continuous numbers a cell and back."""

    name = "emoji-kl"
    data = "Fluent Emoji, both styles, without the concepts held out for tokenizers, on random plain backgrounds"
    beginning = "the blocks that it shares with emoji-vq"
    defaults = Defaults(steps=2500, batch_size=32, learning_rate=3e-3)

    def build(self, device):
        self.pictures = load_pictures(SIDE)[concepts(held_out=False)].reshape(-1, SIDE, SIDE, 4)
        tokenizer = KLTokenizer(AUTOENCODER, UNSHUFFLE, scaling_factor=1.0, sample_size=SIDE)
        start_kl(tokenizer.network)
        return TrainableKL(tokenizer).to(device, memory_format=torch.channels_last)

    def optimizers(self, module, learning_rate):
        network = module.tokenizer.network
        return muon_and_adamw(module, hidden_matrices(network.encoder, network.decoder), learning_rate)

    def batch(self, rng, batch_size, device):
        images = random_pictures(self.pictures, batch_size, rng)
        return {"images": images.to(device, memory_format=torch.channels_last)}

    def load(self, module, folder):
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        module.tokenizer.load_state_dict({key: value.float() for key, value in weights.items()})

    def export(self, module, folder):
        tokenizer = copy.deepcopy(module.tokenizer)
        tokenizer.register_to_config(scaling_factor=1 / self.spread(tokenizer))
        save_bf16(tokenizer, folder)

    @torch.no_grad()
    def spread(self, tokenizer):
        """The standard deviation of latents, over training pictures."""
        images = random_pictures(self.pictures, MEASURED, np.random.default_rng(0))
        parts = [tokenizer.encode_distribution(part.to(tokenizer.device)) for part in images.split(64)]
        means, variances = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "var"))
        return float((means.var() + variances.mean()).sqrt())

    def quality(self, folder):
        from studio.evaluation.tokenizers import evaluate_tokenizer

        return evaluate_tokenizer(KLTokenizer.from_pretrained(folder))
