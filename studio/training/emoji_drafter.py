"""Recipe of `emoji-drafter`, which guesses what `emoji-ar` draws next (EAGLE, arXiv:2401.15077, section 4.2; LANTERN,
arXiv:2410.03355).

The target reads training pictures; from its states and tokens the drafter learns the state one position further, as a
vector, and by the law that the target's head reads from it. What is exported is the target's pipeline with the drafter
in it.

Deviations from LANTERN's code: the first draft behind the prefix is learned too; gradients are clipped by their norm;
no file of states is kept, the target computes them as they are needed.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.data.captions import full_caption, random_caption
from studio.decoding.speculative import Speculative
from studio.evaluation.judge import draw_combinations
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen
from studio.training.export import copy_with_component, load_component
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe
from studio.training.token_cache import training_tokens

TARGET = "emoji-ar"
LAW_WEIGHT = 0.1
"""Weight of the laws' cross-entropy beside the states' distance."""
NULL_SHARE = 0.1
"""Share of the pictures of which the target is not told the caption; drafts are made for the null stream too."""
NOISE = 0.2 * 512
"""Width of the uniform noise on the target's states, times the length of the sequence."""
MEASURED = 16
"""Held-out captions that are drawn to measure a drafter."""


class TrainableDrafter(nn.Module):
    """A drafter, and its target, which stays as it is."""

    def __init__(self, drafter: Drafter, target: LlamaGen):
        super().__init__()
        self.drafter, self.target = drafter, target.requires_grad_(False)

    def train(self, mode: bool = True) -> "TrainableDrafter":
        super().train(mode)
        self.target.eval()
        return self

    def forward(self, tokens, captions, caption_mask, drop):
        """Mean loss over the drafts of image tokens but the first, for tokens (B, n) behind captions (B, T, C)."""
        fed, states, valid, plan = self.read(tokens, captions, caption_mask, drop)
        width = NOISE / states.shape[1]
        noisy = states[:, :-1] + width * (torch.rand_like(states[:, :-1]) - 0.5)
        first = self.target.prefix_length - 1
        guessed, wanted = self.drafter(fed, noisy, valid, plan)[:, first:], states[:, 1 + first :]
        law = self.target.logits(wanted).softmax(dim=-1)
        by_law = -(law * self.target.logits(guessed).log_softmax(dim=-1)).sum(dim=-1).mean()
        return F.smooth_l1_loss(guessed, wanted) + LAW_WEIGHT * by_law

    @torch.no_grad()
    def read(self, tokens, captions, caption_mask, drop):
        """Tokens (B, m) that a drafter is fed, the states (B, m + 1, dim), valid prefix positions (B, T), plan.

        Token i goes with state i and stands behind it; those of prefix positions are 0.
        """
        target = self.target
        prefix, valid = target.embed_condition(captions=captions, caption_mask=caption_mask, drop=drop)
        x = target.inputs(prefix, target.tok_embeddings(tokens[:, :-1]))
        states = target.run_layers(x, target.rope()[: x.shape[1]], target.prefix_mask(valid, x.shape[1]))
        before = tokens.new_zeros(len(tokens), target.prefix_length - 1)
        return torch.cat((before, tokens[:, :-1]), dim=1), states, valid, target.plan(prefix)


class EmojiDrafter(Recipe):
    """Guesses the tokens that `emoji-ar` will draw, several at a time, so that it is called less often."""

    name = "emoji-drafter"
    data = "tokens of emoji-vq for the training combinations, random captions, and the states of emoji-ar over them"
    defaults = Defaults(steps=1500, batch_size=32, learning_rate=2e-3)

    def build(self, device):
        self.pipe = load(TARGET, device=device, dtype=torch.float32)
        self.drawn, self.tokens = training_tokens(self.pipe.image_tokenizer)
        target = self.pipe.transformer
        return TrainableDrafter(Drafter.for_target(target), target)

    def optimizers(self, module, learning_rate):
        matrices = hidden_matrices(module.drafter.fc, module.drafter.layers)
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng, batch_size, device):
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=batch_size))
        captions = [random_caption(*row, rng) for row in self.drawn[chosen].tolist()]
        states, mask = self.pipe.encode_prompt(captions)
        drop = torch.from_numpy(rng.random(batch_size) < NULL_SHARE)
        return {
            "tokens": self.tokens[chosen].to(device),
            "captions": states,
            "caption_mask": mask,
            "drop": drop.to(device),
        }

    def load(self, module, folder):
        load_component(module.drafter, folder, "drafter")

    def export(self, module, folder):
        copy_with_component(self.pipe.name_or_path, folder, "drafter", module.drafter)

    def quality(self, folder):
        """How many tokens a call of the target brings, over held-out captions drawn with their own seeds."""
        pipe = load(folder, device=self.pipe.device)
        pipe.set_progress_bar_config(disable=True)
        chosen = draw_combinations(MEASURED, np.random.default_rng(0))
        generators = [torch.Generator().manual_seed(seed) for seed in range(MEASURED)]
        drawn = pipe(
            [full_caption(*row) for row in chosen.tolist()],
            generator=generators,
            decoding=Speculative(),
            output_type="tokens",
        )
        return {"mean_accepted_length": drawn.stats.mean_accepted_length, "captions": MEASURED}
