"""Recipe of `emoji-mar`: MAR (arXiv:2406.11838) over the latents of `emoji-kl`, for captions.

The text encoder is that of `emoji-ar` and stays as it is: captions end with plan tokens, whose states hold a guess of
the picture, one state for every 2x2 tokens. The buffer holds these, and the last words before them, at fixed places;
each token reads its part of the plan (`plan_size`).

Deviations from the authors' recipe: denoising aims at no number beyond the largest of the training latents
(`token_limit`), without which what so small a head gets wrong of the noisiest states would carry them away; a mask rate
for every step as theirs, but fewer noises a token; Muon for the hidden matrices; no average of the weights is kept,
since the learning rate falls to zero.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from studio.checkpoints.loading import load
from studio.models.mar import MAR
from studio.models.masked_autoencoder import MaskedAutoencoder
from studio.models.plan import plan_layers
from studio.pipelines.mar import MARPipeline
from studio.training.from_words import FromWords, Listening
from studio.training.ingredients import ingredient
from studio.training.latent_cache import training_latents
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults

IMAGE_TOKENIZER = "emoji-kl"
SIZES = {
    **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("dim", 128), ("heads", 4))},
    "encoder_depth": 1,
    "decoder_depth": 3,
    "head_width": 160,
    "head_depth": 3,
    "buffer_size": 24,
    "dropout": 0.0,
}
"""The buffer holds the plan's 16 states and the eight before them. The decoder is deeper: it sees all positions."""
REPEATS = 2
"""Times and noises that each masked token is tried with."""
LEAST_MASKED, SPREAD = 0.7, 0.25
"""The share of tokens that is masked: Gaussian around 1 with this spread, cut off below (MAR, section 4)."""
DRAWING = {
    "default_guidance_scale": 2.0,
    "default_temperature": 0.6,
    "default_num_steps": 16,
    "default_diffusion_steps": 50,
}
"""Of some guidances and temperatures, these came nearest to the pictures of 64 training captions."""


class TrainableMAR(Listening):
    """A MAR, and the text encoder."""

    def forward(self, latents, order, masked, input_ids, attention_mask):
        """Mean loss of latents (B, C, h, w) over the first `masked` positions (1,) of each order (B, L)."""
        model, condition = self.transformer, self.condition(input_ids, attention_mask)
        return model(model.patchify(latents), order, int(masked), **condition, repeats=REPEATS)


class EmojiMAR(FromWords):
    """Draws an emoji from words, a few continuous tokens at a time: a MAR over the latents of `emoji-kl`."""

    name = "emoji-mar"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, latents of emoji-kl"
    defaults = Defaults(steps=2500, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline, drawing = MARPipeline, DRAWING
    sizes = SIZES

    def build(self, device):
        self.listen(device)
        transformer = self.prepared(load(ingredient(IMAGE_TOKENIZER), device=device, dtype=torch.float32))
        return self.trainable(transformer).to(device)

    def trainable(self, transformer):
        """The module around the network."""
        return TrainableMAR(transformer, self.text.text_encoder)

    def prepared(self, image_tokenizer) -> MAR:
        """Keeps what batches are drawn from, and returns a network of random weights for it."""
        weights = Path(image_tokenizer.config["_name_or_path"], "diffusion_pytorch_model.safetensors")
        self.drawn, self.laws = training_latents(image_tokenizer, weights)
        self.image_tokenizer = image_tokenizer
        shape = {
            "grid_size": self.laws.shape[-1],
            "token_dim": image_tokenizer.latent_channels,
            **self.planned_shape(),
        }
        return self.network(image_tokenizer, {**shape, **self.sizes})

    def network(self, image_tokenizer, shape: dict) -> MAR:
        """A network of this shape with random weights, which draws no latents beyond those that there are."""
        scale = image_tokenizer.config.scaling_factor
        limit = float(self.laws[:, 0].abs().max()) * scale
        return MAR(latent_scale=scale, token_limit=limit, **shape)

    def optimizers(self, module, learning_rate):
        return mar_optimizers(module.transformer, module, learning_rate)

    def batch(self, rng, batch_size, device):
        """Latents drawn from their Gaussians, captions, and an order of positions with the number that is masked."""
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=batch_size))
        captions = self.captions(self.drawn[chosen], rng, device)
        means, widths = self.laws[chosen].float().unbind(1)
        noise = torch.from_numpy(rng.standard_normal(means.shape, dtype=np.float32))
        total = means.shape[-1] * means.shape[-2]
        order = torch.from_numpy(rng.random((batch_size, total))).argsort(dim=1)
        masked = int(np.ceil(total * masked_share(rng)))
        return {
            "latents": (means + widths * noise).to(device),
            "order": order.to(device),
            "masked": torch.tensor(masked),
            **captions,
        }

    def export(self, module, folder):
        self.save_pipeline(folder, self.image_tokenizer, module)


def masked_share(rng) -> float:
    """A share of masked tokens: Gaussian around 1, of those from `LEAST_MASKED` to 1."""
    while True:
        share = 1 - abs(rng.normal(scale=SPREAD))
        if share >= LEAST_MASKED:
            return share


def mar_optimizers(
    transformer: MaskedAutoencoder, module: nn.Module, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all blocks; places and mask token, which start small, move at its full rate."""
    of_the_head = (
        transformer.diffloss.net.res_blocks if isinstance(transformer, MAR) else transformer.head.channel_blocks
    )
    blocks = (transformer.encoder_blocks, transformer.decoder_blocks, of_the_head, *plan_layers(transformer))
    places = [
        transformer.encoder_pos_embed_learned,
        transformer.decoder_pos_embed_learned,
        transformer.head_places,
        transformer.mask_token,
        transformer.fake_latent,
    ]
    return muon_and_adamw(module, hidden_matrices(*blocks), learning_rate, tables=places, tables_share=1.0)
