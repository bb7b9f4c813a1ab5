"""Fine-tuning the decoder of a tokenizer of discrete codes: tokens stay what they are, images get better.

With perturbed codes it is RobustTok's training ("Robust Latent Matters: Boosting Image Generation with Sampling Error
Synthesis", arXiv:2503.08354, section 3.3): a part of each batch is restored from codes near the right ones, so that a
decoder forgives what generators get wrong.

Deviations from the authors: encoder and codebook stay as they are, so that generators over these tokens need no
training; the ratio falls linearly to any end (theirs jumps unless that is one half); residual codes too, of which each
goes wrong on its own.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.checkpoints.loading import load_model
from studio.checks import shown
from studio.errors import StudioError
from studio.evaluation.robustness import Perturbation, perturbed_tokens
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.vq import VQTokenizer
from studio.training.learned_codebook import export_with_codebook, load_with_codebook, put_codebook
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import TokenizerRecipe

BETA = 0.1
"""Share of a batch that is perturbed."""
START, END, LAST_RATIO = 0.2, 0.6, 0.5
"""The ratio of the perturbation is 1 until `START` of the run, then falls to `LAST_RATIO` at `END`."""


class DecoderTuning(nn.Module):
    """A tokenizer of which only what follows the codes is trained.

    Args:
        tokenizer: a trained one.
        loss: of restored and true images (B, 3, H, W).
    """

    def __init__(self, tokenizer: VQTokenizer | RVQTokenizer, loss: Any):
        super().__init__()
        self.tokenizer, self.loss = tokenizer, loss
        tokenizer.requires_grad_(False)
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):
            part.requires_grad_(True)

    def forward(
        self, images: torch.Tensor, alpha: torch.Tensor, delta: torch.Tensor, depths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of images (B, 3, H, W) in [-1, 1].

        Args:
            images: the batch, whose first `BETA` is perturbed.
            alpha: the share () of tokens that go wrong.
            delta: among how many of the nearest codes (), the right one included.
            depths: of stacks of codes: as many equal parts of the batch are restored from that many first levels each.
        """
        with torch.no_grad():
            perturbation = Perturbation(float(alpha), int(delta))
            codes = perturbed_tokens(self.tokenizer, images, perturbation, beta=BETA)
            if depths is not None:
                for part, depth in zip(codes.tensor_split(len(depths)), depths.tolist(), strict=True):
                    part[..., depth:] = -1
        return self.loss(self.tokenizer.decode(codes).float(), images)


class TunableRecipe(TokenizerRecipe):
    """A tokenizer whose codebooks follow its encoder, or, where `train` in [model] is "decoder", of which the decoder
    alone is trained, for the tokens of the tokenizer to start from.

    Attributes:
        tokenizer_class: of the tokenizer.
        loss: of restored and true images (B, 3, H, W) where the decoder is tuned.
    """

    tokenizer_class: type[VQTokenizer] | type[RVQTokenizer]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    model = {"train": "all", "perturbed_codes": 1}

    @abstractmethod
    def network(self) -> nn.Module:
        """What is trained where all of it is: it has a `tokenizer` and a `quantizer` that learns the codes."""

    @property
    def tunes_decoder(self) -> bool:
        """Whether the decoder alone is trained."""
        return self.model["train"] == "decoder"

    @property
    def learns_codes(self) -> bool:
        """Whether codebooks are learned."""
        return not self.tunes_decoder

    def build(self) -> torch.nn.Module:
        if self.model["train"] not in ("all", "decoder"):
            raise StudioError(f'train in [model] is "all" or "decoder", not {shown(self.model["train"])}.')
        module = self._decoder() if self.tunes_decoder else self.network()
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its types

    def _decoder(self):
        if self.options.init_from is None:
            raise StudioError("A decoder is tuned for the tokens of a trained tokenizer: name it with --init-from.")
        tokenizer = load_model(self.tokenizer_class, self.find(self.options.init_from), torch.float32)
        self.open(tokenizer.config.sample_size)
        return DecoderTuning(tokenizer, self.loss)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        encoder = [] if self.tunes_decoder else [module.tokenizer.encoder]
        return muon_and_adamw(module, hidden_matrices(*encoder, module.tokenizer.decoder), learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        images = self.images(rng, size, training).contiguous(memory_format=torch.channels_last)
        batch = {"images": images, **self.choices(rng, size, training)}
        if self.tunes_decoder:
            alpha, delta = perturbation_at(self.share, self.model["perturbed_codes"] if training else 1)
            batch |= {"alpha": torch.tensor(alpha), "delta": torch.tensor(delta)}
        return batch

    def choices(self, rng: np.random.Generator, size: int, training: bool) -> dict[str, torch.Tensor]:
        """What a step reads beside the images."""
        return {}

    def load(self, module: Any, folder: Path) -> None:
        if self.learns_codes:
            load_with_codebook(module, folder)
        elif not self.tunes_decoder:  # which has been built from there
            super().load(module, folder)

    def export(self, module: Any, folder: Path) -> None:
        if self.learns_codes:
            export_with_codebook(module, folder)
        else:
            super().export(module, folder)

    def samples(self, module: Any) -> torch.Tensor | None:
        if self.learns_codes:
            put_codebook(module)
        return super().samples(module)


def perturbation_at(share: float, delta: int) -> tuple[float, int]:
    """Alpha and delta when this share of the run is done; `delta` is the widest, and 1 perturbs nothing."""
    ratio = 1 - (1 - LAST_RATIO) * min(1.0, max(0.0, (share - START) / (END - START)))
    return ratio, max(1, int(ratio * delta))
