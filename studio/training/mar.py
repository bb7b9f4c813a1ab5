"""MAR (arXiv:2406.11838): a masked autoregressive transformer over continuous tokens, with a diffusion loss.

Where captions end with plan tokens, the buffer holds their states, and the last words before them, at fixed places;
each token reads its part of the plan.

Deviations from the authors' recipe: denoising aims at no number beyond the largest of the training latents
(`token_limit`), without which what so small a head gets wrong of the noisiest states would carry them away; a mask rate
for every step as theirs, but fewer noises a token; Muon for the hidden matrices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.models.mar import MAR
from studio.models.masked_autoencoder import MaskedAutoencoder, both_halves
from studio.models.region_conditioning import region_conditioning_layers
from studio.pipelines.mar import MARPipeline
from studio.tokenizers.kl import KLTokenizer
from studio.training.caches import cached_latents, latents_of
from studio.training.generator import VALIDATED, Conditioned, GeneratorRecipe
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults

REPEATS = 2
"""Times and noises that each masked token is tried with."""
LEAST_MASKED, SPREAD = 0.7, 0.25
"""The share of tokens that is masked: Gaussian around 1 with this spread, cut off below (MAR, section 4)."""
WORDS_IN_BUFFER = 8
"""Text states before the plan that the buffer holds."""


class TrainableMAR(Conditioned):
    """A MAR with its loss."""

    def forward(
        self, latents: torch.Tensor, order: torch.Tensor, masked: torch.Tensor, **given: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss of latents (B, C, h, w) over the first `masked` positions (1,) of each order (B, L)."""
        model, condition = self.transformer, self.condition(**given)
        return model(model.patchify(latents), order, int(masked), **condition, repeats=REPEATS)


class MARRecipe(GeneratorRecipe):
    """A MAR from scratch."""

    kind = "mar"
    purpose = "Samples a few continuous tokens of an image at a time, under a caption or a class."
    defaults = Defaults(steps=4000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline: type = MARPipeline
    tokenizers = (KLTokenizer,)
    compiles = False
    model = {"encoder_layers": 1, "heads": None, "head_width": 160, "head_depth": 3, "buffer_size": None}
    sampling = {
        "default_guidance_scale": 2.0, "default_temperature": 0.6, "default_num_inference_steps": 16,
        "default_diffusion_steps": 50,
    }  # fmt: skip

    def build(self) -> torch.nn.Module:
        self.prepare()
        self.latents = cached_latents(self.image_tokenizer, self.source)
        self.unseen = torch.from_numpy(latents_of(self.image_tokenizer, self.source.validation, VALIDATED))
        return self.trainable(self.network(self.sizes())).to(self.device)

    def trainable(self, transformer: MaskedAutoencoder) -> Conditioned:
        """The module around the network."""
        return TrainableMAR(transformer, self.text)

    def sizes(self) -> dict:
        """The configuration of a network without that of its head. The decoder is deeper: it sees all positions."""
        dim, layers = self.options.dim or 128, self.options.layers or 4
        heads = self.model["heads"] or max(1, dim // 32)
        plan = self.text.plan_size**2 if self.text else 0
        return {
            **both_halves(dim, self.model["encoder_layers"], heads),
            "decoder_depth": layers - self.model["encoder_layers"],
            "buffer_size": self.model["buffer_size"] or plan + WORDS_IN_BUFFER,
            "dropout": 0.0,
            "grid_size": self.latents.shape[-1],
            "token_dim": self.image_tokenizer.latent_channels,
            **self.condition_shape(),
        }

    def network(self, sizes: dict) -> MaskedAutoencoder:
        """A network of random weights, which samples no latents beyond those that there are."""
        scale = self.image_tokenizer.config.scaling_factor
        limit = max(float(part[:, 0].abs().max()) for part in self.latents.split(1024)) * scale
        head = {name: self.model[name] for name in ("head_width", "head_depth")}
        return MAR(latent_scale=scale, token_limit=limit, **head, **sizes)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        return mar_optimizers(module.transformer, module, learning_rate, self.text_matrices(module))

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        """Latents sampled from their Gaussians, a condition, and an order of positions with the number masked."""
        indices, condition = self.chosen(rng, size, training)
        means, widths = (self.latents if training else self.unseen)[torch.from_numpy(indices)].float().unbind(1)
        noise = torch.from_numpy(rng.standard_normal(means.shape, dtype=np.float32))
        total = means.shape[-1] * means.shape[-2]
        order = torch.from_numpy(rng.random((size, total))).argsort(dim=1)
        masked = torch.tensor(int(np.ceil(total * masked_share(rng))))
        return {"latents": means + widths * noise, "order": order, "masked": masked, **condition}


def masked_share(rng: np.random.Generator) -> float:
    """A share of masked tokens: Gaussian around 1, of those from `LEAST_MASKED` to 1."""
    while True:
        share = 1 - abs(rng.normal(scale=SPREAD))
        if share >= LEAST_MASKED:
            return share


def mar_optimizers(
    transformer: MaskedAutoencoder, module: nn.Module, learning_rate: float, further: Sequence[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all blocks, and `further` ones; places and mask token, which start small, move at its
    full rate.
    """
    of_the_head = (
        transformer.diffloss.net.res_blocks if isinstance(transformer, MAR) else transformer.head.channel_blocks
    )
    blocks = (
        transformer.encoder_blocks,
        transformer.decoder_blocks,
        of_the_head,
        *region_conditioning_layers(transformer),
    )
    places = [
        transformer.encoder_pos_embed_learned,
        transformer.decoder_pos_embed_learned,
        transformer.head_positions,
        transformer.mask_token,
        transformer.fake_latent,
    ]
    matrices = [*hidden_matrices(*blocks), *further]
    return muon_and_adamw(module, matrices, learning_rate, tables=places, tables_share=1.0)
