"""ResGen (arXiv:2412.10208) over the residual codes of an RVQ tokenizer.

The spread of the mixture is that of what the quantiser leaves over, as in CLaM-TTS (arXiv:2404.02781). Ours: the free
parts of the means start at sums of levels of training images, so that every component begins where the data lie; Muon
for the hidden matrices. With `prediction = "levels"` in `[model]` a softmax for every level takes the place of the
mixture: the paper's ablation.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from studio.decoding.residual_masks import hidden_slots, hide, shown
from studio.models.gaussian_mixture import GaussianMixture
from studio.models.region_conditioning import region_conditioning_layers
from studio.models.resgen import ResGen
from studio.pipelines.resgen import ResGenPipeline
from studio.tokenizers.rvq import RVQTokenizer
from studio.training.caches import cached_tokens, tokens_of
from studio.training.generator import VALIDATED, Conditioned, GeneratorRecipe
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults
from studio.training.text import Text

MEASURED = 512
"""Images whose residuals say how wide a component is."""


class ConditionedOnCodes(Conditioned):
    """A network, the text encoder, and the quantiser of its codes."""

    quantizer: Any

    def __init__(self, transformer: nn.Module, text: Text | None, quantizer: nn.Module):
        super().__init__(transformer, text)
        self.quantizer = quantizer.requires_grad_(False)


class TrainableResGen(ConditionedOnCodes):
    """A ResGen with its loss."""

    def forward(self, codes: torch.Tensor, hidden: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        """Mean cost of the hidden levels, of which each cell has `hidden` (B, L), of codes (B, L, D)."""
        return self.transformer.loss(self.quantizer.lookup(codes), codes, hidden, **self.condition(**given))


class CodesRecipe(GeneratorRecipe):
    """A recipe over stacks of codes.

    Attributes:
        codes, unseen: those of the training and of some validation examples (n, L, D).
    """

    tokenizers = (RVQTokenizer,)

    def prepare(self) -> None:
        super().prepare()
        depth = self.image_tokenizer.config.depth
        codes = cached_tokens(self.image_tokenizer, self.source)
        self.codes = codes.unflatten(1, (-1, depth))
        unseen = torch.from_numpy(tokens_of(self.image_tokenizer, self.source.validation, VALIDATED))
        self.unseen = unseen.unflatten(1, (-1, depth))

    def code_shape(self) -> dict:
        """What the configuration of a network says of these codes."""
        tables = self.image_tokenizer.codebooks
        return {"depth": len(tables), "vocab_size": max(map(len, tables)), "code_dim": tables[0].shape[1]}


class ResGenRecipe(CodesRecipe):
    """A ResGen from scratch."""

    kind = "resgen"
    purpose = "Samples all levels of many cells of an image at a time, under a caption or a class."
    defaults = Defaults(steps=4000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline = ResGenPipeline
    model = {"num_heads": None, "prediction": "mixture", "components": 128, "rank": 16}
    sampling = {
        "default_guidance_scale": 1.0, "default_temperature": 1.0, "default_top_k": 0, "default_top_p": 1.0,
        "default_num_inference_steps": 16,
    }  # fmt: skip

    def build(self) -> torch.nn.Module:
        self.prepare()
        dim = self.options.dim or 128
        head = {"prediction": self.model["prediction"]}
        if head["prediction"] == "mixture":
            head |= {"sigma": self.left_over(), "components": self.model["components"], "rank": self.model["rank"]}
        transformer = ResGen(
            num_positions=self.codes.shape[1],
            dim=dim,
            num_layers=self.options.layers or 4,
            num_heads=self.model["num_heads"] or max(1, dim // 32),
            **head,
            **self.code_shape(),
            **self.condition_shape(),
        ).to(self.device)
        quantizer = self.image_tokenizer.quantizer
        if head["prediction"] == "mixture":
            start_means(transformer.head, self.codes.to(self.device), quantizer)
        return TrainableResGen(transformer, self.text, quantizer).to(self.device)

    @torch.no_grad()
    def left_over(self) -> float:
        """The standard deviation of what all levels leave over, over training images."""
        tokenizer, train = self.image_tokenizer, self.source.train
        images = train.images(range(0, len(train), max(1, len(train) // MEASURED)))
        vectors = torch.cat([tokenizer.encode_features(part.to(tokenizer.device)) for part in images.split(64)])
        quantizer = tokenizer.quantizer
        return float((vectors - quantizer.lookup(quantizer.encode(vectors)).sum(dim=-2)).std())

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        model = module.transformer
        matrices = [*hidden_matrices(model.blocks, *region_conditioning_layers(model)), *self.text_matrices(module)]
        tables = [model.positions, model.hidden_levels.weight]
        if self.model["prediction"] == "mixture":
            tables.append(model.head.offsets)
        return muon_and_adamw(module, matrices, learning_rate, tables=tables, tables_share=1.0)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        """Codes, a condition, and how many levels of each cell are hidden, after a random time of the noising."""
        indices, condition = self.chosen(rng, size, training)
        codes = (self.codes if training else self.unseen)[torch.from_numpy(indices)]
        count = hidden_slots(torch.from_numpy(rng.random(size)), codes[0].numel()).clamp(min=1)
        return {"codes": codes, "hidden": hide(torch.from_numpy(rng.random(codes.shape)), count), **condition}


@torch.no_grad()
def start_means(head: GaussianMixture, codes: torch.Tensor, quantizer: Any) -> None:
    """Put the free part of every mean of a mixture at the sum of the deepest levels, any number of them, of some cell
    of codes (n, L, D).
    """
    rng, cells = np.random.default_rng(0), codes.flatten(0, 1)
    chosen = torch.from_numpy(rng.integers(len(cells), size=head.components))
    depth = cells.shape[1]
    hidden = torch.from_numpy(rng.integers(1, depth + 1, size=head.components)).to(cells.device)
    vectors = quantizer.lookup(cells[chosen.to(cells.device)])
    head.offsets.copy_((vectors * ~shown(hidden, depth)[..., None]).sum(dim=-2))
