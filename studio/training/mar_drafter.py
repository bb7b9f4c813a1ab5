"""A small MAR that drafts for a larger one (continuous speculative decoding, arXiv:2411.11925).

A draft passes the target's test more often the closer their denoising steps are, so the draft learns the target's
steps and not only the data: at the same tokens, time and noise, the noise that the target predicts, and its variance.

Deviation from the authors, who take a smaller model of the same family as it is: the target teaches.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.decoding.cspd import ContinuousSpeculative
from studio.models.mar import MAR
from studio.models.masked_autoencoder import both_halves, take_rows
from studio.pipelines.mar import MARPipeline
from studio.training.caches import cached_latents, latents_of
from studio.training.companion import CompanionRecipe
from studio.training.generator import VALIDATED
from studio.training.mar import REPEATS, mar_optimizers, masked_share
from studio.training.recipe import Defaults

UNCONDITIONAL_SHARE = 0.1
"""Share of the images without a condition; drafts are made for the unconditional stream too."""
VARIANCE_WEIGHT = 0.1


class TrainableMARDrafter(nn.Module):
    """A drafter, and the target that teaches it and stays as it is."""

    def __init__(self, drafter: MAR, target: MAR):
        super().__init__()
        self.drafter, self.target = drafter, target.requires_grad_(False)

    def train(self, mode: bool = True) -> "TrainableMARDrafter":
        super().train(mode)
        self.target.eval()
        return self

    def forward(
        self,
        latents: torch.Tensor,
        order: torch.Tensor,
        masked: torch.Tensor,
        drop: torch.Tensor,
        **given: torch.Tensor,
    ) -> torch.Tensor:
        """Mean distance between the noise, and the logits of variance, that drafter and target predict."""
        tokens, count = self.target.patchify(latents), int(masked)
        hidden, visible = order[:, :count], order[:, count:]
        condition = {**given, "drop": drop}
        truth = take_rows(tokens, hidden).flatten(0, 1).repeat(REPEATS, 1)
        diffusion = self.target.diffloss.schedule()
        times = torch.randint(diffusion.steps, (len(truth),), device=truth.device)
        noised = diffusion.diffuse(truth, times, torch.randn_like(truth))

        def predicted(model):
            buffer, _ = model.embed_condition(**condition)
            vectors = model.conditions(tokens, visible, hidden, buffer)[0].flatten(0, 1)
            return model.diffloss.net(noised, times, vectors.repeat(REPEATS, 1)).float().chunk(2, dim=1)

        with torch.no_grad():
            noise, logits = predicted(self.target)
        drafted_noise, drafted_logits = predicted(self.drafter)
        return F.mse_loss(drafted_noise, noise) + VARIANCE_WEIGHT * F.mse_loss(drafted_logits, logits)


class MARDrafterRecipe(CompanionRecipe):
    """A drafter for a MAR."""

    kind = "mar-drafter"
    purpose = "Drafts the continuous tokens that a MAR will sample, at a fraction of its cost."
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    takes = frozenset({"target", "dim", "layers"})
    model = {"head_width": 96, "head_depth": 2}
    component, pipeline = "drafter", MARPipeline
    compiles = False

    def build(self) -> torch.nn.Module:
        self.prepare()
        tokenizer, target = self.pipe.image_tokenizer, self.pipe.transformer
        self.latents = cached_latents(tokenizer, self.source)
        self.unseen = torch.from_numpy(latents_of(tokenizer, self.source.validation, VALIDATED))
        dim = self.options.dim or max(32, target.config.decoder_dim // 2)
        sizes = {**both_halves(dim, 1, max(1, dim // 32)), "decoder_depth": max(1, (self.options.layers or 2) - 1)}
        config = {name: value for name, value in target.config.items() if not name.startswith("_")}
        return TrainableMARDrafter(MAR(**{**config, **sizes, **self.model}), target).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        return mar_optimizers(module.drafter, module, learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        latents = self.latents if training else self.unseen
        indices = rng.integers(len(latents), size=size)
        means, widths = latents[torch.from_numpy(indices)].float().unbind(1)
        total = means.shape[-1] * means.shape[-2]
        return {
            "latents": means + widths * torch.from_numpy(rng.standard_normal(means.shape, dtype=np.float32)),
            "order": torch.from_numpy(rng.random((size, total))).argsort(dim=1),
            "masked": torch.tensor(int(np.ceil(total * masked_share(rng)))),
            "drop": torch.from_numpy(rng.random(size) < UNCONDITIONAL_SHARE),
            **self.condition(indices, rng, training),
        }

    def quality(self, folder: Path) -> dict:
        """What share of its drafts the target accepts, over validation examples sampled with their own seeds."""
        pipe = load(folder, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        rates = {}
        for mode in ("exact", "relaxed"):
            out = self.measured(pipe, decoding=ContinuousSpeculative(mode=mode), output_type="tokens")
            rates[f"acceptance_{mode}"] = out.stats.acceptance
        return {**rates, "images": len(out.tokens)}
