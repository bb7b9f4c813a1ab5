"""Recipe of `emoji-1d`."""

import numpy as np
import torch
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.data.archive import load_pictures
from studio.data.splits import concepts
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.training.emoji_vq import random_pictures, reconstruction_loss
from studio.training.learned_codebook import export_with_codebook, load_with_codebook, start_codebooks
from studio.training.muon import muon_and_adamw
from studio.training.pyramid_start import start_as_pyramid
from studio.training.recipe import Defaults, Recipe

CONFIG = {
    "sample_size": 64,
    "patch_size": 8,
    "num_tokens": 128,
    "encoder_width": 192,
    "encoder_layers": 4,
    "encoder_heads": 3,
    "decoder_width": 192,
    "decoder_layers": 4,
    "decoder_heads": 3,
    "code_dim": 12,
    "codebook_size": 4096,
    "legacy_reshape": False,
    "pixel_stage": "patches",
    "pixel_base_channels": 96,
}
FITTED_TO = 256
"""Pictures that the start is fitted to."""
GROUPS = 4
"""Parts of a batch that are restored from numbers of tokens of their own, the last one from all of them: as dear as one
number for all, less noisy.
"""


class TrainableOneD(nn.Module):
    """A OneDPieceTokenizer whose codebook follows the encoder by exponential averages (cosine codes, dead codes
    revived).
    """

    def __init__(self, config):
        super().__init__()
        self.tokenizer = OneDPieceTokenizer(**config)
        self.tokenizer.quantize.requires_grad_(False)
        self.quantizer = VectorQuantize(
            dim=config["code_dim"], codebook_size=config["codebook_size"], use_cosine_sim=True, decay=0.99,
            kmeans_init=False, threshold_ema_dead_code=0.2, commitment_weight=0.25,
        )  # fmt: skip

    @torch.no_grad()
    def start(self, images):
        """Starts as a pyramid (`studio.training.pyramid_start`), with its codes."""
        start_as_pyramid(self.tokenizer, images)
        start_codebooks(self, [self.tokenizer.codebook])

    def forward(self, images, lengths):
        """Loss of pictures (B, 3, H, W) in [-1, 1]: restoration and commitment.

        As many equal parts of the batch as there are `lengths` are restored from that many first tokens each (Tail
        Token Drop, arXiv:2501.10064, section 3.2).
        """
        quantized, _, commitment = self.quantizer(self.tokenizer.encode_features(images).float())
        parts = zip(quantized.tensor_split(len(lengths)), lengths.tolist())
        restored = torch.cat([self.tokenizer.decode_vectors(part, length) for part, length in parts]).float()
        return reconstruction_loss(restored, images) + commitment.sum()


class Emoji1D(Recipe):
    """Turns a 64 px picture into a row of 128 tokens of 4,096 codes, of which any first few are a picture."""

    name = "emoji-1d"
    beginning = "a codec that linear algebra fits to pictures"
    data = "Fluent Emoji, both styles, without the concepts held out for tokenizers, on random plain backgrounds"
    defaults = Defaults(steps=2400, batch_size=32, learning_rate=2e-3)

    def build(self, device):
        side = CONFIG["sample_size"]
        self.pictures = load_pictures(side)[concepts(held_out=False)].reshape(-1, side, side, 4)
        module = TrainableOneD(CONFIG)
        module.start(random_pictures(self.pictures, FITTED_TO, np.random.default_rng(0)))
        return module.to(device)

    def optimizers(self, module, learning_rate):
        blocks = (module.tokenizer.encoder.transformer, module.tokenizer.decoder.transformer)
        matrices = [weight for part in blocks for weight in part.parameters() if weight.ndim == 2]
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng, batch_size, device):
        most = CONFIG["num_tokens"]
        lengths = [*random_lengths(min(GROUPS, batch_size) - 1, most, rng), most]
        images = random_pictures(self.pictures, batch_size, rng)
        return {"images": images.to(device), "lengths": torch.tensor(lengths)}

    def load(self, module, folder):
        load_with_codebook(module, folder)

    def export(self, module, folder):
        export_with_codebook(module, folder)

    def quality(self, folder):
        from studio.evaluation.tokenizers import evaluate_tokenizer

        return evaluate_tokenizer(OneDPieceTokenizer.from_pretrained(folder))


def random_lengths(count, most, rng):
    """As many numbers from 1 to `most`, each as likely as any other, one from each of equal parts of that range."""
    return (1 + (np.arange(count) + rng.random(count)) * most / max(1, count)).astype(np.int64).clip(1, most)
