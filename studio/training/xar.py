"""xAR (arXiv:2502.20388) over the latents of a KL tokenizer.

What is predicted from is as in `mar`; all cells of an image are predicted in one pass. Deviation from the authors'
recipe: Muon for the hidden matrices.
"""

from typing import Any

import numpy as np
import torch

from studio.models.xar import XAR
from studio.pipelines.xar import XARPipeline
from studio.training.generator import Conditioned
from studio.training.mar import MARRecipe
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults


class TrainableXAR(Conditioned):
    """An xAR with its loss."""

    noisy_context = True

    def forward(self, latents: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        """Mean loss of latents (B, C, h, w)."""
        model, condition = self.transformer, self.condition(**given)
        return model(model.patchify(latents), noisy_context=self.noisy_context, **condition)


class XARRecipe(MARRecipe):
    """An xAR from scratch."""

    kind = "xar"
    purpose = "Samples an image cell by cell, each by a flow from noise, under a caption or a class."
    defaults = Defaults(steps=4000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline = XARPipeline
    model = {"heads": None, "cell_size": None, "noisy_context": True}
    sampling = {"default_guidance_scale": 1.5, "default_temperature": 1.0, "default_num_inference_steps": 20}

    def trainable(self, transformer: Any) -> Conditioned:
        module = TrainableXAR(transformer, self.text)
        module.noisy_context = self.model["noisy_context"]
        return module

    def sizes(self) -> dict:
        dim, grid = self.options.dim or 128, self.latents.shape[-1]
        return {
            "dim": dim,
            "depth": self.options.layers or 6,
            "num_heads": self.model["heads"] or max(1, dim // 32),
            "cell_size": self.model["cell_size"] or max(1, grid // 2),
            "grid_size": grid,
            "token_dim": self.image_tokenizer.latent_channels,
            "latent_scale": self.image_tokenizer.config.scaling_factor,
            "dropout": 0.0,
            **self.condition_shape(),
        }

    def network(self, sizes: dict) -> Any:
        return XAR(**sizes)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        model = module.transformer
        matrices = [*hidden_matrices(model.blocks), *self.text_matrices(module)]
        return muon_and_adamw(module, matrices, learning_rate, tables=[*model.places, model.null], tables_share=1.0)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        batch = super().batch(rng, size, training)
        return {name: value for name, value in batch.items() if name not in ("order", "masked")}
