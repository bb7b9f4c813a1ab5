"""Recipe of `emoji-vq`."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.data.archive import load_pictures
from studio.data.augmentation import move
from studio.data.backgrounds import PALETTE, compose
from studio.data.splits import concepts
from studio.tokenizers.vq import VQTokenizer
from studio.training.learned_codebook import export_with_codebook, load_with_codebook
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

CONFIG = {
    "base_channels": 96,
    "channel_multipliers": (1, 1),
    "encoder_res_blocks": 2,
    "decoder_res_blocks": 3,
    "z_channels": 192,
    "code_dim": 8,
    "codebook_size": 4096,
    "pixel_unshuffle": 4,
    "sample_size": 64,
}
CONTEXT_WEIGHT = 4


class TrainableVQ(nn.Module):
    """A VQTokenizer whose codebook follows the encoder by exponential averages (cosine codes, dead codes revived)."""

    def __init__(self, config):
        super().__init__()
        self.tokenizer = VQTokenizer(**config)
        self.tokenizer.quantize.requires_grad_(False)
        self.quantizer = VectorQuantize(
            dim=config["code_dim"], codebook_size=config["codebook_size"], use_cosine_sim=True, decay=0.99,
            kmeans_init=False, threshold_ema_dead_code=0.2, commitment_weight=0.25, accept_image_fmap=True,
        )  # fmt: skip

    def forward(self, images, cells):
        """Loss of pictures (B, 3, H, W) in [-1, 1]: restoration, commitment, and tokens that depend on their own cell.

        The first n pictures are also encoded with some cells exchanged for their neighbour's, where `cells` (n, h, w)
        is false. What a cell becomes should not change with its surroundings: a token that tells of other cells makes
        the restoration better, but is a riddle for a model that has to predict it.
        """
        own = images[: len(cells)]
        shown = cells.repeat_interleave(self.tokenizer.downsample_factor, 1)
        shown = shown.repeat_interleave(self.tokenizer.downsample_factor, 2)[:, None]
        mixed = torch.where(shown, own, own.roll(1, 0)).contiguous(memory_format=torch.channels_last)
        features = self.tokenizer.encode_features(torch.cat((images, mixed))).float()
        features, of_mixed = features[: len(images)], features[len(images) :]
        of_own = features[: len(cells)]
        expected = torch.where(cells[:, None], of_own, of_own.roll(1, 0))
        quantized, _, commitment = self.quantizer(features)
        restored = self.tokenizer.decode_features(quantized).float()
        context = 1 - F.cosine_similarity(of_mixed, expected, dim=1).mean()
        return reconstruction_loss(restored, images) + commitment.sum() + CONTEXT_WEIGHT * context


def reconstruction_loss(restored, images):
    """Mean absolute error, the same for differences of neighbours, and each picture's root mean squared error.

    The last term weighs every picture about alike, as a mean of per-picture PSNR does.
    """
    error = restored - images
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    rmse = (error.square().mean(dim=(1, 2, 3)) + 1e-5).sqrt().mean()
    return 0.5 * error.abs().mean() + 0.5 * edges + rmse


class EmojiVQ(Recipe):
    """Turns a 64 px picture into an 8x8 grid of 4,096 codes and back."""

    name = "emoji-vq"
    data = "Fluent Emoji, both styles, without the concepts held out for tokenizers, on random plain backgrounds"
    defaults = Defaults(steps=2200, batch_size=32, learning_rate=3e-3)

    def build(self, device):
        self.pictures = load_pictures(CONFIG["sample_size"])[concepts(held_out=False)].reshape(
            -1, *[CONFIG["sample_size"]] * 2, 4
        )
        module = TrainableVQ(CONFIG)
        self.grid = CONFIG["sample_size"] // module.tokenizer.downsample_factor
        return module.to(device, memory_format=torch.channels_last)

    def optimizers(self, module, learning_rate):
        matrices = hidden_matrices(module.tokenizer.encoder, module.tokenizer.decoder)
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng, batch_size, device):
        images = random_pictures(self.pictures, batch_size, rng)
        return {
            "images": images.to(device, memory_format=torch.channels_last),
            "cells": torch.from_numpy(rectangles(rng, batch_size // 2, self.grid)).to(device),
        }

    def load(self, module, folder):
        load_with_codebook(module, folder)

    def export(self, module, folder):
        export_with_codebook(module, folder)

    def quality(self, folder):
        from studio.evaluation.tokenizers import evaluate_tokenizer

        return evaluate_tokenizer(VQTokenizer.from_pretrained(folder))


def random_pictures(pictures, n, rng):
    """Pictures (n, 3, side, side) in [-1, 1] out of premultiplied RGBA (m, side, side, 4), uint8.

    They are flipped, moved, zoomed, at times recoloured; 60 % on named backgrounds, the rest on any colour.
    """
    chosen = pictures[rng.integers(len(pictures), size=n)]
    named = PALETTE[rng.integers(len(PALETTE), size=n)]
    colours = np.where(rng.random((n, 1)) < 0.6, named, rng.random((n, 3)))
    images = torch.from_numpy(compose(chosen, colours))
    return augment(images, torch.from_numpy(colours).float(), rng) * 2 - 1


def rectangles(rng, n, side):
    """Masks (n, side, side), bool, of a random rectangle each, at least one cell and never all of them."""
    height, width = rng.integers(1, side + 1, size=(2, n))
    height = np.where((height == side) & (width == side), side - 1, height)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    place = np.arange(side)
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None, :]


def augment(images, colours, rng):
    """Random geometry and colour on half of the pictures; what comes in at the edges has the background's colour."""
    n = len(images)
    flip = torch.from_numpy(rng.random(n) < 0.5)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    images = move(images, colours, rng, share=0.5, zoom=(0.8, 1.6), angle=0.3, shift=0.2)
    recoloured = torch.from_numpy(rng.random(n) < 0.15)
    order = torch.from_numpy(np.stack([rng.permutation(3) for _ in range(n)]))
    shuffled = images.gather(1, order[:, :, None, None].expand_as(images))
    return torch.where(recoloured[:, None, None, None], shuffled, images).clamp(0, 1)
