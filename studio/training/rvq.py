"""Residual VQ tokenizer (RQ-VAE, arXiv:2203.01941): stacks of codes, of which the first ones are an image too.

Where the options name a trained VQ tokenizer (`--init-from` of the kind vq), encoder and decoder start from its blocks.
With `same_tokens_as` in [model], codes stay those of a smaller RVQ tokenizer (`studio.training.same_tokens`).
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vector_quantize_pytorch import ResidualVQ

from studio.checkpoints.loading import load_model
from studio.tokenizers.rvq import RVQTokenizer
from studio.training.from_vq import is_vq, start_rvq
from studio.training.one_d_piece import random_lengths
from studio.training.recipe import Defaults, downsampling
from studio.training.robust_decoder import TunableRecipe
from studio.training.same_tokens import SameTokens, check_reference, start_coarse
from studio.training.vq import reconstruction_loss

WHOLE, CUT = 2, 2
"""Parts of a batch that are restored from all levels, and parts that are restored from some first ones."""
MEASURED = 512
"""Images whose vectors say how widely they are spread."""


class TrainableRVQ(nn.Module):
    """An RVQTokenizer whose codebooks follow the encoder by exponential averages (dead codes revived)."""

    def __init__(self, config: dict):
        super().__init__()
        self.tokenizer = RVQTokenizer(**config)
        self.tokenizer.quantizer.requires_grad_(False)
        self.quantizer = ResidualVQ(
            dim=config["feature_dim"], num_quantizers=config["depth"], codebook_size=config["codebook_size"],
            decay=0.99, kmeans_init=True, threshold_ema_dead_code=0.5, rotation_trick=False,
        )  # fmt: skip

    def forward(self, images: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """Loss of images (B, 3, H, W) in [-1, 1]: reconstruction and commitment (arXiv:2203.01941, equations 7 and 8).

        As many equal parts of the batch as there are `depths` are restored from that many first levels each, so that
        these are an image too.
        """
        vectors = self.tokenizer.encode_features(images).float()
        rests, commitment = self.residuals(vectors)
        parts = zip(*(rest.tensor_split(len(depths)) for rest in rests), strict=True)
        kept = torch.cat([part[depth - 1] for part, depth in zip(parts, depths.tolist(), strict=True)])
        restored = self.tokenizer.decode_features(vectors - kept).float()
        return reconstruction_loss(restored, images) + 0.25 * commitment

    def residuals(self, vectors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
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


class SameStacks(SameTokens):
    """An `RVQTokenizer` that learns another's vectors, and to restore from its codes."""

    def tokens_of(self, images: torch.Tensor, choices: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = self.reference.encode_features(images)
        codes = self.reference.quantizer.encode(vectors)
        depths = choices["depths"].tolist()
        for part, depth in zip(codes.tensor_split(len(depths)), depths, strict=True):
            part[..., depth:] = -1
        return vectors, self.reference.quantizer.lookup(codes).sum(dim=-2)

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode_features(images)

    def restoration(self, fed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return reconstruction_loss(self.tokenizer.decode_features(fed).float(), images)


class RVQRecipe(TunableRecipe):
    """An image tokenizer of a stack of codes a cell."""

    kind = "rvq"
    purpose = "Turns an image into a grid of stacks of discrete tokens and back; the first levels are an image too."
    task = "image-tokenizer"
    defaults = Defaults(steps=4000, batch_size=32, learning_rate=3e-3)
    takes = frozenset({"size", "grid", "codes", "dim", "layers"})
    model = {**TunableRecipe.model, "depth": 4, "feature_dim": 16, "z_channels": 192, "same_tokens_as": ""}
    tokenizer_class = RVQTokenizer
    loss = staticmethod(reconstruction_loss)

    @property
    def learns_codes(self) -> bool:
        return super().learns_codes and not self.model["same_tokens_as"]

    def network(self) -> torch.nn.Module:
        options = self.options
        size = options.size or 128
        grid = options.grid or size // 8
        folded, halvings = downsampling(size, grid)
        reference = None
        if name := self.model["same_tokens_as"]:
            reference = load_model(RVQTokenizer, self.find(name), torch.float32)
            check_reference(reference, size, grid)
        self.open(size)
        config = {
            "base_channels": options.dim or 96,
            "channel_multipliers": (1,) * (halvings + 1),
            "res_blocks": options.layers or 2,
            "attention_levels": (halvings,),
            "z_channels": self.model["z_channels"],
            "feature_dim": self.model["feature_dim"],
            "depth": self.model["depth"],
            "codebook_size": options.codes or 1024,
            "shared_codebook": False,
            "pixel_unshuffle": folded,
            "sample_size": size,
        }  # fmt: skip
        if reference is None:
            return TrainableRVQ(config)
        codes = ("feature_dim", "cell", "depth", "codebook_size", "shared_codebook")
        tokenizer = RVQTokenizer(**{**config, **{name: reference.config[name] for name in codes}})
        self.model["depth"] = tokenizer.config.depth
        start_coarse(tokenizer, reference)
        return SameStacks(tokenizer, reference)

    def choices(self, rng: np.random.Generator, size: int, training: bool) -> dict[str, torch.Tensor]:
        most = self.model["depth"]
        depths = [most] * WHOLE + (random_lengths(CUT, most, rng).tolist() if training else [most] * CUT)
        return {"depths": torch.tensor(depths)}

    def load(self, module: Any, folder: Path) -> None:
        if not self.tunes_decoder and is_vq(folder):
            start_rvq(module.tokenizer, folder)
            if isinstance(module, SameTokens):
                start_coarse(module.tokenizer, module.reference)
        else:
            super().load(module, folder)

    def export(self, module: Any, folder: Path) -> None:
        if self.learns_codes:
            module = copy.deepcopy(module)
            scale_vectors(module, 1 / self.spread(module.tokenizer))
        super().export(module, folder)

    @torch.no_grad()
    def spread(self, tokenizer: RVQTokenizer) -> float:
        """The standard deviation of vectors before quantisation, over training images."""
        images = self.source.augmented(np.random.default_rng(0), MEASURED)
        return float(
            torch.cat([tokenizer.encode_features(part.to(tokenizer.device)) for part in images.split(64)]).std()
        )


@torch.no_grad()
def scale_vectors(module: TrainableRVQ, factor: float) -> None:
    """Multiply the vectors that are quantised, and their codes; code numbers and images stay the same.

    A generator of sums of codes then finds them at one scale, whatever scale the encoder came to.
    """
    tokenizer = module.tokenizer
    tokenizer.quant_conv.weight.mul_(factor)
    tokenizer.quant_conv.bias.mul_(factor)
    tokenizer.post_quant_conv.weight.div_(factor)
    for layer in module.quantizer.layers:
        layer._codebook.embed.mul_(factor)
