"""Recipe of `emoji-mar-draft`, the small MAR that drafts for `emoji-mar` (continuous speculative decoding,
arXiv:2411.11925).

A draft passes the target's test more often the closer their denoising steps are, so the draft learns the target's
steps and not only the data: at the same tokens, time and noise, the noise that the target predicts, and its variance.
What is exported is the target's pipeline with the drafter in it.

Deviation from the authors, who take a smaller model of the same family as it is: the target teaches.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.data.captions import full_caption
from studio.decoding.continuous_speculative import ContinuousSpeculative
from studio.evaluation.judge import draw_combinations
from studio.models.mar import MAR
from studio.models.masked_autoencoder import take_rows
from studio.training.emoji_mar import SIZES, EmojiMAR, mar_optimizers
from studio.training.export import copy_with_component, load_component
from studio.training.ingredients import ingredient
from studio.training.recipe import Defaults

TARGET = "emoji-mar"
DRAFT = {
    **SIZES,
    **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("dim", 64), ("heads", 2))},
    "encoder_depth": 1,
    "decoder_depth": 1,
    "head_width": 96,
    "head_depth": 2,
}
NULL_SHARE = 0.1
"""Share of the pictures without a caption; drafts are made for the null stream too."""
REPEATS = 2
VARIANCE_WEIGHT = 0.1
MEASURED = 16
"""Held-out captions that are drawn to measure a drafter."""


class TrainableDraft(nn.Module):
    """A drafter, and the target that teaches it and stays as it is."""

    def __init__(self, drafter: MAR, target: MAR, text_encoder):
        super().__init__()
        self.drafter = drafter
        self.target, self.text_encoder = target.requires_grad_(False), text_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "TrainableDraft":
        super().train(mode)
        self.target.eval()
        self.text_encoder.eval()
        return self

    def forward(self, latents, order, masked, input_ids, attention_mask):
        """Mean distance between the noise, and the logits of variance, that drafter and target predict."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        tokens, count = self.target.patchify(latents), int(masked)
        hidden, visible = order[:, :count], order[:, count:]
        drop = torch.rand(len(tokens), device=tokens.device) < NULL_SHARE
        condition = {"captions": states, "caption_mask": attention_mask, "drop": drop}
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


class EmojiMARDraft(EmojiMAR):
    """Drafts the tokens that `emoji-mar` will draw, at a fraction of its cost."""

    name = "emoji-mar-draft"
    data = "latents of emoji-kl for the training combinations, random captions, and the steps of emoji-mar over them"
    defaults = Defaults(steps=2500, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    sizes = DRAFT

    def build(self, device):
        self.pipe = self.text = load(ingredient(TARGET), device=device, dtype=torch.float32)
        drafter = self.prepared(self.pipe.image_tokenizer)
        return TrainableDraft(drafter, self.pipe.transformer, self.pipe.text_encoder).to(device)

    def optimizers(self, module, learning_rate):
        return mar_optimizers(module.drafter, module, learning_rate)

    def load(self, module, folder):
        load_component(module.drafter, folder, "drafter")

    def export(self, module, folder):
        copy_with_component(self.pipe.name_or_path, folder, "drafter", module.drafter)

    def quality(self, folder):
        """What share of its drafts the target accepts, over held-out captions drawn with their own seeds."""
        pipe = load(folder, device=self.pipe.device)
        pipe.set_progress_bar_config(disable=True)
        chosen = draw_combinations(MEASURED, np.random.default_rng(0))
        captions = [full_caption(*row) for row in chosen.tolist()]
        measured = {}
        for mode in ("exact", "relaxed"):
            generators = [torch.Generator().manual_seed(seed) for seed in range(MEASURED)]
            decoding = ContinuousSpeculative(mode=mode)
            drawn = pipe(captions, generator=generators, decoding=decoding, output_type="tokens")
            measured[f"acceptance_{mode}"] = drawn.stats.acceptance
        return {**measured, "captions": MEASURED}
