"""Drafter for speculative decoding (EAGLE, arXiv:2401.15077, section 4.2; LANTERN, arXiv:2410.03355).

The target reads training images; from its states and tokens the drafter learns the state one position further, as a
vector, and by the distribution that the target's head reads from it.

Deviations from LANTERN's code: the first draft behind the prefix is learned too; gradients are clipped by their norm;
no file of states is kept, the target computes them as they are needed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.decoding.eagle import AutoDrafts
from studio.decoding.speculative import Speculative
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.training.caches import cached_tokens, tokens_of
from studio.training.companion import CompanionRecipe
from studio.training.generator import VALIDATED
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults

DISTRIBUTION_WEIGHT = 0.1
"""Weight of the distributions' cross-entropy beside the states' distance."""
UNCONDITIONAL_SHARE = 0.1
"""Share of the images of which the target does not see the condition; drafts are made for that stream too."""
NOISE = 0.2 * 512
"""Width of the uniform noise on the target's states, times the length of the sequence."""


class TrainableDrafter(nn.Module):
    """A drafter, and its target, which stays as it is."""

    def __init__(self, drafter: Drafter, target: LlamaGen):
        super().__init__()
        self.drafter, self.target = drafter, target.requires_grad_(False)

    def train(self, mode: bool = True) -> "TrainableDrafter":
        super().train(mode)
        self.target.eval()
        return self

    def forward(self, tokens: torch.Tensor, drop: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        """Mean loss over the drafts of image tokens but the first, for tokens (B, n)."""
        fed, states, valid, plan = self.read(tokens, drop, **condition)
        width = NOISE / states.shape[1] if self.training else 0.0
        noisy = states[:, :-1] + width * (torch.rand_like(states[:, :-1]) - 0.5)
        first = self.target.prefix_length - 1
        guessed, wanted = self.drafter(fed, noisy, valid, plan)[:, first:], states[:, 1 + first :]
        expected = self.target.logits(wanted).softmax(dim=-1)
        by_distribution = -(expected * self.target.logits(guessed).log_softmax(dim=-1)).sum(dim=-1).mean()
        return F.smooth_l1_loss(guessed, wanted) + DISTRIBUTION_WEIGHT * by_distribution

    @torch.no_grad()
    def read(self, tokens: torch.Tensor, drop: torch.Tensor, **condition: torch.Tensor) -> tuple:
        """Tokens (B, m) that a drafter is fed, the states (B, m + 1, dim), valid prefix positions (B, T), plan.

        Token i goes with state i and stands behind it; those of prefix positions are 0.
        """
        target = self.target
        prefix, valid = target.embed_condition(**condition, drop=drop)
        x = target.inputs(prefix, target.tok_embeddings(tokens[:, :-1]))
        states = target.run_layers(x, target.rope()[: x.shape[1]], target.prefix_mask(valid, x.shape[1]))
        before = tokens.new_zeros(len(tokens), target.prefix_length - 1)
        return torch.cat((before, tokens[:, :-1]), dim=1), states, valid, target.region_conditioning(prefix)


class DrafterRecipe(CompanionRecipe):
    """A drafter for a LlamaGen."""

    kind = "drafter"
    purpose = "Guesses the tokens that a LlamaGen will sample, several at a time, so that it is called less often."
    defaults = Defaults(steps=1500, batch_size=32, learning_rate=2e-3)
    component, pipeline = "drafter", LlamaGenPipeline

    def build(self) -> torch.nn.Module:
        self.prepare()
        tokenizer, target = self.pipe.image_tokenizer, self.pipe.transformer
        self.tokens = cached_tokens(tokenizer, self.source)
        self.unseen = torch.from_numpy(tokens_of(tokenizer, self.source.validation, VALIDATED))
        return TrainableDrafter(Drafter.for_target(target), target).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        matrices = hidden_matrices(module.drafter.fc, module.drafter.layers)
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        tokens = self.tokens if training else self.unseen
        indices = rng.integers(len(tokens), size=size)
        drop = torch.from_numpy(rng.random(size) < UNCONDITIONAL_SHARE)
        return {"tokens": tokens[torch.from_numpy(indices)], "drop": drop, **self.condition(indices, rng, training)}

    def quality(self, folder: Path) -> dict:
        """How many tokens a call of the target brings, over validation captions sampled with their own seeds."""
        pipe = load(folder, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        out = self.measured(pipe, decoding=Speculative(drafts=AutoDrafts()), output_type="tokens")
        return {"mean_accepted_length": out.stats.mean_accepted_length, "images": len(out.tokens)}
