"""One-D-Piece tokenizer (arXiv:2501.10064): a row of tokens, coarse to fine, of which any first few are an image.

Deviations from the authors' recipe: it starts as a codec that linear algebra fits to images (`pyramid_init`); codes by
exponential averages; no adversarial or perceptual term.

With `same_tokens_as` in [model], tokens stay those of a smaller One-D-Piece tokenizer, whose encoder this one has, and
only the decoder is trained.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from studio.checkpoints.loading import load_model
from studio.checks import shown
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


class SameRows(nn.Module):
    """A OneDPieceTokenizer of which the decoder alone is trained."""

    def __init__(self, tokenizer: OneDPieceTokenizer):
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)
        for part in (tokenizer.decoder, tokenizer.pixel_decoder):
            part.requires_grad_(True)

    def forward(self, images: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Loss of what is restored from the first tokens of images (B, 3, H, W); `lengths` as of `TrainableOneD`."""
        with torch.no_grad():
            vectors = self.tokenizer.quantize.lookup(self.tokenizer.encode(images)).transpose(1, 2)
        parts = zip(vectors.tensor_split(len(lengths)), lengths.tolist())
        restored = torch.cat([self.tokenizer.decode_vectors(part, length) for part, length in parts]).float()
        return reconstruction_loss(restored, images)


@torch.no_grad()
def larger_patches(reference: OneDPieceTokenizer, size: int) -> OneDPieceTokenizer:
    """A tokenizer for images of `size` pixels that does what another does with the reduced images: its patches are
    larger by the same factor. Tokens are the same, and restored images those of the other with each pixel repeated.

    Raises:
        StudioError: a size that is not a multiple of the other's, or another pixel stage than "patches".
    """
    side, patch = reference.config.sample_size, reference.config.patch_size
    if reference.config.pixel_stage != "patches" or size <= side or size % side or patch % 2:
        raise StudioError(
            f"same_tokens_as names a tokenizer for images of {side} px: take a --size that is a multiple of {side}, at "
            f"least {2 * side}, not {shown(size)}, and a tokenizer with the pixel stage patches, of even size."
        )
    factor = size // side
    config = {name: value for name, value in reference.config.items() if not name.startswith("_")}
    tokenizer = OneDPieceTokenizer(**{**config, "sample_size": size, "patch_size": patch * factor})
    weights = reference.state_dict()

    def of_pixels(name, dim, block, scale=1.0):
        weight = weights[name].unflatten(dim, (-1, block, block))
        for axis in (dim + 1, dim + 2):
            weight = weight.repeat_interleave(factor, axis)
        weights[name] = weight.flatten(dim, dim + 2) * scale

    weights["encoder.patch_embed.weight"] = (
        weights["encoder.patch_embed.weight"].repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2
    )
    for name in ("weight", "bias"):
        of_pixels(f"decoder.ffn.2.{name}", 0, patch)
        of_pixels(f"pixel_decoder.conv_out.{name}", 0, patch // 2)
    of_pixels("pixel_decoder.conv_in.weight", 1, patch // 2, 1 / factor**2)
    tokenizer.load_state_dict(weights)
    return tokenizer


class OneDPieceRecipe(TokenizerRecipe):
    """An image tokenizer of a row of tokens."""

    kind = "one-d-piece"
    purpose = "Turns an image into a row of tokens, coarse to fine, of which any first few are an image."
    task = "image-tokenizer"
    origin = "a codec that linear algebra fits to images"
    defaults = Defaults(steps=6000, batch_size=32, learning_rate=2e-3)
    takes = frozenset({"size", "tokens", "codes", "dim", "layers"})
    model = {"patch_size": None, "code_dim": 12, "same_tokens_as": ""}
    compiles = False

    def build(self) -> torch.nn.Module:
        options = self.options
        size, width, layers = options.size or 128, options.dim or 192, options.layers or 4
        patch = self.model["patch_size"] or max(1, size // 16)
        if size % patch:
            raise StudioError(f"patch_size must divide the images' {size} px; {patch} does not.")
        sizes = {"width": width, "layers": layers, "heads": max(1, width // 64)}
        self.most = options.tokens or 256
        self.open(size)
        if name := self.model["same_tokens_as"]:
            reference = load_model(OneDPieceTokenizer, self.find(name), torch.float32)
            self.most = reference.config.num_tokens
            return SameRows(larger_patches(reference, size)).to(self.device)
        module = TrainableOneD({
            "sample_size": size,
            "patch_size": patch,
            "num_tokens": self.most,
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
        matrices = [weight for weight in matrices if weight.requires_grad]
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        most = self.most
        lengths = [*random_lengths(min(GROUPS, size) - 1, most, rng), most]
        return {"images": self.images(rng, size, training), "lengths": torch.tensor(lengths)}

    def load(self, module: Any, folder: Path) -> None:
        if self.model["same_tokens_as"]:
            super().load(module, folder)
        else:
            load_with_codebook(module, folder)

    def export(self, module: Any, folder: Path) -> None:
        if self.model["same_tokens_as"]:
            super().export(module, folder)
        else:
            export_with_codebook(module, folder)

    def samples(self, module: Any) -> torch.Tensor | None:
        """Images, and what all, a quarter and a sixteenth of their tokens restore."""
        if not self.model["same_tokens_as"]:
            put_codebook(module)
        images = self.source.unseen.images(range(min(self.shown, len(self.source.unseen)))).to(self.device)
        tokens = module.tokenizer.encode(images)
        lengths = sorted({max(1, tokens.shape[1] // part) for part in (1, 4, 16)}, reverse=True)
        rows = [images, *(module.tokenizer.decode(tokens, length) for length in lengths)]
        return (torch.stack(rows) / 2 + 0.5).clamp(0, 1)


def random_lengths(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """As many numbers from 1 to `most`, each as likely as any other, one from each of equal parts of that range."""
    return (1 + (np.arange(count) + rng.random(count)) * most / max(1, count)).astype(np.int64).clip(1, most)
