"""Recipe of `emoji-rvq`, whose encoder and decoder are those of `emoji-vq` at the start."""

import copy

import numpy as np
import torch
from torch import nn
from vector_quantize_pytorch import ResidualVQ

from studio.data.archive import load_pictures
from studio.data.splits import concepts
from studio.tokenizers.rvq import RVQTokenizer
from studio.training.emoji_1d import random_lengths
from studio.training.emoji_vq import random_pictures, reconstruction_loss
from studio.training.from_vq import start_rvq
from studio.training.learned_codebook import export_with_codebook, load_with_codebook
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

CONFIG = {
    "base_channels": 96,
    "channel_multipliers": (1, 1),
    "res_blocks": 2,
    "attention_levels": (1,),
    "z_channels": 192,
    "feature_dim": 16,
    "depth": 4,
    "codebook_size": 1024,
    "shared_codebook": False,
    "pixel_unshuffle": 4,
    "sample_size": 64,
}
WHOLE, CUT = 2, 2
"""Parts of a batch that are restored from all levels, and parts that are restored from some first ones."""
MEASURED = 512
"""Pictures whose vectors say how widely they are spread."""


class TrainableRVQ(nn.Module):
    """An RVQTokenizer whose codebooks follow the encoder by exponential averages (dead codes revived)."""

    def __init__(self, config):
        super().__init__()
        self.tokenizer = RVQTokenizer(**config)
        self.quantizer = ResidualVQ(
            dim=config["feature_dim"], num_quantizers=config["depth"], codebook_size=config["codebook_size"],
            decay=0.99, kmeans_init=True, threshold_ema_dead_code=0.5, rotation_trick=False,
        )  # fmt: skip

    def forward(self, images, depths):
        """Loss of pictures (B, 3, H, W) in [-1, 1]: restoration and commitment (arXiv:2203.01941, equations 7 and 8).

        As many equal parts of the batch as there are `depths` are restored from that many first levels each, so that
        these are a picture too.
        """
        vectors = self.tokenizer.encode_features(images).float()
        rests, commitment = self.residuals(vectors)
        parts = zip(*(rest.tensor_split(len(depths)) for rest in rests), strict=True)
        kept = torch.cat([part[depth - 1] for part, depth in zip(parts, depths.tolist(), strict=True)])
        restored = self.tokenizer.decode_features(vectors - kept).float()
        return reconstruction_loss(restored, images) + 0.25 * commitment

    def residuals(self, vectors):
        """What each level leaves over of vectors (B, h, w, C), without gradients, and the mean commitment loss.

        The layers are called one by one: all of `ResidualVQ` gives the sums of whole stacks only, with a gradient that
        counts every level (straight-through it should be 1, which a constant residual gives).
        """
        rest, rests, commitments = vectors.flatten(1, 2), [], []
        for layer in self.quantizer.layers:
            code, _, commitment = layer(rest)
            rest = rest - code.detach()
            rests.append(rest.detach().view_as(vectors))
            commitments.append(commitment.sum())
        return rests, torch.stack(commitments).mean()


class EmojiRVQ(Recipe):
    """Turns a 64 px picture into an 8x8 grid of stacks of four codes, of which the first ones are a picture too."""

    name = "emoji-rvq"
    data = "Fluent Emoji, both styles, without the concepts held out for tokenizers, on random plain backgrounds"
    beginning = "the encoder and the decoder of emoji-vq"
    defaults = Defaults(steps=2500, batch_size=32, learning_rate=3e-3)

    def build(self, device):
        side = CONFIG["sample_size"]
        self.pictures = load_pictures(side)[concepts(held_out=False)].reshape(-1, side, side, 4)
        module = TrainableRVQ(CONFIG)
        start_rvq(module.tokenizer)
        return module.to(device, memory_format=torch.channels_last)

    def optimizers(self, module, learning_rate):
        matrices = hidden_matrices(module.tokenizer.encoder, module.tokenizer.decoder)
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng, batch_size, device):
        most = CONFIG["depth"]
        images = random_pictures(self.pictures, batch_size, rng)
        return {
            "images": images.to(device, memory_format=torch.channels_last),
            "depths": torch.tensor([most] * WHOLE + random_lengths(CUT, most, rng).tolist()),
        }

    def load(self, module, folder):
        load_with_codebook(module, folder)

    def export(self, module, folder):
        scaled = copy.deepcopy(module)
        scale_vectors(scaled, 1 / self.spread(module.tokenizer))
        export_with_codebook(scaled, folder)

    @torch.no_grad()
    def spread(self, tokenizer):
        """The standard deviation of vectors before quantisation, over training pictures."""
        images = random_pictures(self.pictures, MEASURED, np.random.default_rng(0))
        return float(
            torch.cat([tokenizer.encode_features(part.to(tokenizer.device)) for part in images.split(64)]).std()
        )

    def quality(self, folder):
        from studio.evaluation.tokenizers import evaluate_tokenizer

        return evaluate_tokenizer(RVQTokenizer.from_pretrained(folder))


@torch.no_grad()
def scale_vectors(module, factor):
    """Multiply the vectors that a `TrainableRVQ` quantises, and its codes; code numbers and pictures stay the same.

    What learns to draw sums of codes then finds them at one scale, whatever scale the encoder came to.
    """
    tokenizer = module.tokenizer
    tokenizer.quant_conv.weight.mul_(factor)
    tokenizer.quant_conv.bias.mul_(factor)
    tokenizer.post_quant_conv.weight.div_(factor)
    for layer in module.quantizer.layers:
        layer._codebook.embed.mul_(factor)
