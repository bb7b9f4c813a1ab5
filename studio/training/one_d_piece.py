"""One-D-Piece tokenizer (arXiv:2501.10064): a row of tokens, coarse to fine, of which any first few are an image.

Deviations from the authors' recipe: it starts as a codec that linear algebra fits to images (`pyramid_init`); codes by
exponential averages; no adversarial or perceptual term.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.errors import StudioError
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.training.learned_codebook import export_with_codebook, load_with_codebook, put_codebook, start_codebooks
from studio.training.muon import muon_and_adamw
from studio.training.pyramid_init import init_as_pyramid
from studio.training.recipe import Defaults, TokenizerRecipe
from studio.training.vq import reconstruction_loss

FITTED_TO = 256
"""Images that the start is fitted to."""
GROUPS = 4
"""Parts of a batch that are restored from numbers of tokens of their own, the last one from all of them: as dear as one
number for all, less noisy.
"""


class TrainableOneD(nn.Module):
    """A OneDPieceTokenizer whose codebook follows the encoder by exponential averages (cosine codes, dead codes
    revived).
    """

    def __init__(self, config: dict):
        super().__init__()
        self.tokenizer = OneDPieceTokenizer(**config)
        self.tokenizer.quantize.requires_grad_(False)
        self.quantizer = VectorQuantize(
            dim=config["code_dim"], codebook_size=config["codebook_size"], use_cosine_sim=True, decay=0.99,
            kmeans_init=False, threshold_ema_dead_code=0.2, commitment_weight=0.25,
        )  # fmt: skip

    @torch.no_grad()
    def start(self, images: torch.Tensor) -> None:
        """Starts as a pyramid, with its codes."""
        init_as_pyramid(self.tokenizer, images)
        start_codebooks(self, [self.tokenizer.codebook])

    def forward(self, images: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Loss of images (B, 3, H, W) in [-1, 1]: reconstruction and commitment.

        As many equal parts of the batch as there are `lengths` are restored from that many first tokens each (Tail
        Token Drop, arXiv:2501.10064, section 3.2).
        """
        quantized, _, commitment = self.quantizer(self.tokenizer.encode_features(images).float())
        parts = zip(quantized.tensor_split(len(lengths)), lengths.tolist())
        restored = torch.cat([self.tokenizer.decode_vectors(part, length) for part, length in parts]).float()
        return reconstruction_loss(restored, images) + commitment.sum()


class OneDPieceRecipe(TokenizerRecipe):
    """An image tokenizer of a row of tokens."""

    kind = "one-d-piece"
    purpose = "Turns an image into a row of tokens, coarse to fine, of which any first few are an image."
    task = "image-tokenizer"
    origin = "a codec that linear algebra fits to images"
    defaults = Defaults(steps=6000, batch_size=32, learning_rate=2e-3)
    takes = frozenset({"size", "tokens", "codes", "dim", "layers"})
    model = {"patch_size": None, "code_dim": 12}
    compiles = False

    def build(self) -> torch.nn.Module:
        options = self.options
        size, width, layers = options.size or 128, options.dim or 192, options.layers or 4
        patch = self.model["patch_size"] or max(1, size // 16)
        if size % patch:
            raise StudioError(f"patch_size must divide the images' {size} px; {patch} does not.")
        sizes = {"width": width, "layers": layers, "heads": max(1, width // 64)}
        self.open(size)
        module = TrainableOneD({
            "sample_size": size,
            "patch_size": patch,
            "num_tokens": options.tokens or 256,
            **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()},
            "code_dim": self.model["code_dim"],
            "codebook_size": options.codes or 4096,
            "legacy_reshape": False,
            "pixel_stage": "patches",
        })  # fmt: skip
        if options.init_from is None:
            module.start(self.source.augmented(np.random.default_rng(0), FITTED_TO))
        return module.to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        blocks = (module.tokenizer.encoder.transformer, module.tokenizer.decoder.transformer)
        matrices = [weight for part in blocks for weight in part.parameters() if weight.ndim == 2]
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        most = self.options.tokens or 256
        lengths = [*random_lengths(min(GROUPS, size) - 1, most, rng), most]
        return {"images": self.images(rng, size, training), "lengths": torch.tensor(lengths)}

    def load(self, module: Any, folder: Path) -> None:
        load_with_codebook(module, folder)

    def export(self, module: Any, folder: Path) -> None:
        export_with_codebook(module, folder)

    def samples(self, module: Any) -> torch.Tensor | None:
        """Images, and what all, a quarter and a sixteenth of their tokens restore."""
        put_codebook(module)
        images = self.source.unseen.images(range(min(self.shown, len(self.source.unseen)))).to(self.device)
        tokens = module.tokenizer.encode(images)
        lengths = sorted({max(1, tokens.shape[1] // part) for part in (1, 4, 16)}, reverse=True)
        rows = [images, *(module.tokenizer.decode(tokens, length) for length in lengths)]
        return (torch.stack(rows) / 2 + 0.5).clamp(0, 1)


def random_lengths(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """As many numbers from 1 to `most`, each as likely as any other, one from each of equal parts of that range."""
    return (1 + (np.arange(count) + rng.random(count)) * most / max(1, count)).astype(np.int64).clip(1, most)
