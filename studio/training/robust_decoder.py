"""Fine-tuning the decoder of a VQ tokenizer: tokens stay what they are, images get better.

With perturbed codes it is RobustTok's training ("Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", arXiv:2503.08354, section 3.3): a part of each batch is restored from codes near the right ones, so that a
decoder forgives what generators get wrong.

Deviations from the authors: encoder and codebook stay as they are, so that generators over these tokens need no
training; the ratio falls linearly to any end (theirs jumps unless that is one half).
"""

import torch
from torch import nn

from studio.evaluation.robustness import Perturbation, perturbed_codes
from studio.tokenizers.vq import VQTokenizer

BETA = 0.1
"""Share of a batch that is perturbed."""
START, END, LAST_RATIO = 0.2, 0.6, 0.5
"""The ratio of the perturbation is 1 until `START` of the run, then falls to `LAST_RATIO` at `END`."""


class DecoderTuning(nn.Module):
    """A VQTokenizer of which only what follows the codes is trained.

    Args:
        tokenizer: a trained one.
        loss: of restored and true images (B, 3, H, W).
    """

    def __init__(self, tokenizer: VQTokenizer, loss):
        super().__init__()
        self.tokenizer, self.loss = tokenizer, loss
        tokenizer.requires_grad_(False)
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):
            part.requires_grad_(True)

    def forward(self, images: torch.Tensor, alpha: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """The loss of images (B, 3, H, W) in [-1, 1].

        Args:
            images: the batch, whose first `BETA` is perturbed.
            alpha: the share () of tokens that go wrong.
            delta: among how many of the nearest codes (), the right one included.
        """
        with torch.no_grad():
            vectors = self.tokenizer.encode_features(images).float().movedim(1, -1)
            perturbation = Perturbation(float(alpha), int(delta))
            flat = nn.functional.normalize(vectors.flatten(1, 2), dim=-1)
            codes = perturbed_codes(flat, self.tokenizer.codebook, perturbation, beta=BETA).view(vectors.shape[:-1])
        return self.loss(self.tokenizer.decode(codes).float(), images)


def perturbation_at(share: float, delta: int) -> tuple[float, int]:
    """Alpha and delta when this share of the run is done; `delta` is the widest, and 1 perturbs nothing."""
    ratio = 1 - (1 - LAST_RATIO) * min(1.0, max(0.0, (share - START) / (END - START)))
    return ratio, max(1, int(ratio * delta))
