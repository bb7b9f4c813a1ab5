"""Recipe of `emoji-decoder`: the decoder of `emoji-vq`, sharpened against a critic.

A decoder that is only asked for small errors paints what it is unsure of as a blur, and what is between two styles as
neither. A critic that learns to tell restored pictures from true ones of the same style makes it decide ("Taming
Transformers", arXiv:2012.09841, section 3.1; hinge losses of arXiv:1705.02894). Encoder and codes stay as they are, and
so does every token, so that the generators over them go on as before.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from studio.checkpoints.bundled import bundled_folder
from studio.data.archive import STYLES, load_pictures
from studio.data.splits import concepts
from studio.tokenizers.vq import VQTokenizer
from studio.training.emoji_vq import random_pictures, reconstruction_loss
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

TOKENIZER = "emoji-vq"
WIDTHS = (24, 48, 96, 128)
"""Channels of the critic at the full resolution, a half, a quarter and an eighth of it."""
CRITIC_WEIGHT, LIKENESS_WEIGHT = 0.01, 0.1
"""Of the critic's opinion, and of the relative distance of what it sees, beside the restoration's loss."""


class Critic(nn.Module):
    """Says of every patch of a picture, for each style, how true it looks as a patch of that style."""

    def __init__(self, widths, styles):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.further = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.verdict = nn.Conv2d(widths[-1], styles, 3, padding=1)

    def forward(self, images, styles):
        """Scores (B, h, w) of pictures (B, 3, H, W) in [-1, 1] as pictures of the styles (B,), and all features."""
        features = [F.leaky_relu(self.first(images), 0.2)]
        for layer in self.further:
            features.append(F.leaky_relu(layer(features[-1]), 0.2))
        scores = self.verdict(features[-1])
        return scores[torch.arange(len(styles), device=styles.device), styles], features


class SharpenedVQ(nn.Module):
    """A tokenizer whose decoder is trained, and its critic."""

    def __init__(self, tokenizer, critic):
        super().__init__()
        self.tokenizer, self.critic = tokenizer.requires_grad_(False), critic
        for part in (tokenizer.decoder, tokenizer.post_quant_conv):
            part.requires_grad_(True)

    def forward(self, images, styles):
        """The decoder's loss and the critic's, of pictures (B, 3, H, W) in [-1, 1] in the styles (B,)."""
        with torch.no_grad():
            tokens = self.tokenizer.encode(images)
        restored = self.tokenizer.decode(tokens).float()
        true, seen_in_true = self.critic(images, styles)
        false, _ = self.critic(restored.detach(), styles)
        critics = F.relu(1 - true).mean() + F.relu(1 + false).mean()
        as_it_is = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        opinion, seen = functional_call(self.critic, as_it_is, (restored, styles))
        likeness = sum(relative_distance(mine, theirs.detach()) for mine, theirs in zip(seen, seen_in_true)) / len(seen)
        decoders = reconstruction_loss(restored, images) - CRITIC_WEIGHT * opinion.mean() + LIKENESS_WEIGHT * likeness
        return decoders + critics


def relative_distance(features, true):
    """Mean absolute distance over the mean size of the true ones, so that a critic cannot make it count for more."""
    return F.l1_loss(features, true) / true.abs().mean()


class EmojiDecoder(Recipe):
    """Sharpens the pictures of `emoji-vq`: its decoder learns against a critic, its tokens stay as they are."""

    name = "emoji-decoder"
    data = "Fluent Emoji, both styles, without the concepts held out for tokenizers, on random plain backgrounds"
    defaults = Defaults(steps=1000, batch_size=32, learning_rate=3e-4)

    def build(self, device):
        tokenizer = VQTokenizer.from_pretrained(bundled_folder(TOKENIZER), dtype=torch.float32)
        self.pictures = load_pictures(tokenizer.config.sample_size)[concepts(held_out=False)]
        return SharpenedVQ(tokenizer, Critic(WIDTHS, len(STYLES))).to(device, memory_format=torch.channels_last)

    def optimizers(self, module, learning_rate):
        decoder = muon_and_adamw(module.tokenizer, hidden_matrices(module.tokenizer.decoder), learning_rate)
        return [*decoder, torch.optim.AdamW(module.critic.parameters(), lr=3 * learning_rate, betas=(0.5, 0.95))]

    def batch(self, rng, batch_size, device):
        styles = torch.arange(batch_size) % len(STYLES)
        images = torch.empty(batch_size, 3, *self.pictures.shape[2:4])
        for style in range(len(STYLES)):
            of_style = styles == style
            if of_style.any():
                images[of_style] = random_pictures(self.pictures[:, style], int(of_style.sum()), rng)
        return {"images": images.to(device, memory_format=torch.channels_last), "styles": styles.to(device)}

    def load(self, module, folder):
        module.tokenizer.load_state_dict(VQTokenizer.from_pretrained(folder, dtype=torch.float32).state_dict())

    def export(self, module, folder):
        save_bf16(module.tokenizer, folder)

    def quality(self, folder):
        from studio.evaluation.tokenizers import evaluate_tokenizer

        return evaluate_tokenizer(VQTokenizer.from_pretrained(folder))
