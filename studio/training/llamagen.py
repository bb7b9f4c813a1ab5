"""LlamaGen (arXiv:2406.06525): an autoregressive transformer over discrete tokens of a grid, or of a row.

Deviations from the authors' recipe: some earlier tokens are hidden or those of another image, since a model that can
trust all of them hardly reads its condition, and one wrong token then leads it to another subject; codes share what
is learned through a linear map of their code vectors; Muon for the hidden matrices.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce

from studio.models.llamagen import LlamaGen
from studio.models.region_conditioning import region_conditioning_layers
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.vq import VQTokenizer
from studio.training.caches import cached_tokens, tokens_of
from studio.training.generator import VALIDATED, Conditioned, GeneratorRecipe, grid_of
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.pyramid_init import pyramid
from studio.training.recipe import Defaults
from studio.training.text import Text

HIDING, MISLEADING = 0.25, 0.5
"""Shares of the images of which some earlier tokens are hidden, or are those of another image: from none to all."""
ELSEWHERE = 0.01
"""Share of a region that a token of a row does not stand for, beside those that it does."""


class TrainableLlamaGen(Conditioned):
    """The token model and its text encoder.

    While it is trained, a code's embedding and its row of the output layer are a vector of its own plus a linear map of
    its code vector. The maps are learned from all codes at once, so that a model that knows about what belongs into a
    cell gives weight to every code that looks like that; `merged` adds them to the tables.
    """

    codebook: torch.Tensor

    def __init__(self, transformer: LlamaGen, text: Text | None, codebook: torch.Tensor):
        super().__init__(transformer, text)
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        dim, code_dim = transformer.config.dim, codebook.shape[1]
        self.code_embedding = torch.nn.Parameter(torch.zeros(code_dim, dim))
        self.code_output = torch.nn.Parameter(torch.zeros(code_dim, dim))

    @torch.no_grad()
    def merged(self) -> LlamaGen:
        """A copy of the token model that gives the same logits by its own tables."""
        transformer = copy.deepcopy(self.transformer)
        transformer.tok_embeddings.weight += self.codebook @ self.code_embedding
        transformer.output.weight += self.codebook @ self.code_output
        return transformer

    def forward(
        self, tokens: torch.Tensor, fed: torch.Tensor, seen: torch.Tensor, **given: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy of tokens (B, n) under a condition, some of which are dropped in training.

        The tokens `fed` (B, n - 1) are the earlier ones, but for some that mislead; only those in `seen` (B, n - 1)
        are visible.
        """
        model, drop = self.transformer, None
        if self.training:
            drop = torch.rand(len(tokens), device=tokens.device) < model.config.class_dropout
        prefix, valid = model.embed_condition(**self.condition(**given), drop=drop)
        embedded = model.tok_embeddings(fed) + self.codebook[fed] @ self.code_embedding
        x = model.inputs(prefix, embedded * seen[..., None])
        x = model.run_layers(x, model.rope()[: x.shape[1]], model.prefix_mask(valid, x.shape[1]))
        output = model.output.weight + self.codebook @ self.code_output
        logits = F.linear(x[:, prefix.shape[1] - 1 :], output).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class LlamaGenRecipe(GeneratorRecipe):
    """A LlamaGen from scratch."""

    kind = "llamagen"
    purpose = "Samples the tokens of an image one after the other, under a caption or a class."
    defaults = Defaults(steps=4000, batch_size=64, learning_rate=4e-3, cooldown=0.4)
    pipeline, tokenizers = LlamaGenPipeline, (VQTokenizer, OneDPieceTokenizer)
    compiles_on_cpu = True
    model = {"num_heads": None, "ffn_dim": None}
    sampling = {
        "default_guidance_scale": 3.0, "default_temperature": 0.7, "default_top_k": 0, "default_top_p": 1.0,
    }  # fmt: skip

    def build(self) -> torch.nn.Module:
        self.prepare()
        tokenizer = self.image_tokenizer
        self.tokens = cached_tokens(tokenizer, self.source)
        self.unseen = torch.from_numpy(tokens_of(tokenizer, self.source.validation, VALIDATED))
        dim = self.options.dim or 288
        transformer = LlamaGen(
            vocab_size=len(tokenizer.codebook),
            dim=dim,
            num_layers=self.options.layers or 6,
            num_heads=self.model["num_heads"] or max(1, dim // 48),
            ffn_dim=self.model["ffn_dim"] or dim * 8 // 3,
            grid_size=grid_of(tokenizer),
            row_length=tokenizer.row_length,
            prefix_rope="identity",
            dropout=0.0,
            **self.condition_shape(),
        )
        if tokenizer.row_length and transformer.config.plan_size:
            read_initial_regions(transformer, tokenizer.encoder.side)
        return TrainableLlamaGen(transformer, self.text, tokenizer.codebook).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        model, maps = module.transformer, [module.code_embedding, module.code_output]
        matrices = [*hidden_matrices(model.layers, *region_conditioning_layers(model)), *self.text_matrices(module)]
        return muon_and_adamw(module, matrices, learning_rate, tables=maps, tables_share=1.0)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        indices, condition = self.chosen(rng, size, training)
        tokens = (self.tokens if training else self.unseen)[torch.from_numpy(indices)]
        if training:
            return {"tokens": tokens, **earlier_tokens(tokens, rng), **condition}
        earlier = tokens[:, :-1]
        return {"tokens": tokens, "fed": earlier, "seen": torch.ones_like(earlier, dtype=torch.bool), **condition}

    def pipeline_of(self, module: Any, image_tokenizer: torch.nn.Module | None = None) -> Any:
        if isinstance(module, TrainableLlamaGen):
            module = _Merged(module)
        return super().pipeline_of(module, image_tokenizer)

    def save_pipeline(self, folder: Path, module: Any, image_tokenizer: torch.nn.Module | None = None) -> None:
        super().save_pipeline(folder, _Merged(module), image_tokenizer)


class _Merged(torch.nn.Module):
    """A trained module with the maps of its codebook in its tables."""

    def __init__(self, module: TrainableLlamaGen):
        super().__init__()
        self.transformer, self.text_encoder = module.merged(), module.text_encoder


@torch.no_grad()
def read_initial_regions(transformer: LlamaGen, side: int) -> None:
    """Lets each token of a row read the plan of the regions that it stood for when its tokenizer's training began
    (`pyramid_init`), in a grid of `side` a side.
    """
    shares: Any
    shares, regions = transformer.plan_embeddings.shares, transformer.config.plan_size
    sizes = {"r": regions, "c": regions, "i": side // regions}
    stood_for = reduce(pyramid(side, len(shares)), "n (r i c j) -> n (r c)", "sum", **sizes)
    shares.copy_((stood_for + ELSEWHERE).log())


def earlier_tokens(tokens: torch.Tensor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """What is `fed` to a `TrainableLlamaGen` of tokens (B, n), and what of it is `seen`, both (B, n - 1)."""
    earlier = tokens[:, :-1]
    return {
        "fed": misled(earlier, rng),
        "seen": ~torch.from_numpy(scattered((earlier.shape[0], earlier.shape[1]), HIDING, rng)),
    }


def misled(tokens: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Tokens (B, n) or stacks of codes (B, n, D), in some images partly those of the image before in the batch."""
    shape = tokens.shape[0], tokens.shape[1]
    chosen = scattered(shape, MISLEADING / 2, rng) | stretches(shape, MISLEADING / 2, rng)
    foreign = torch.from_numpy(chosen).view(*shape, *[1] * (tokens.ndim - 2))
    return torch.where(foreign, tokens.roll(1, dims=0), tokens)


def scattered(shape: tuple[int, int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Places (B, n) bool: in this share of the rows some, any part of them, wherever they are."""
    parts = rng.random((shape[0], 1)) * (rng.random((shape[0], 1)) < share)
    return rng.random(shape) < parts


def stretches(shape: tuple[int, int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Places (B, n) bool: in this share of the rows a stretch between any two."""
    ends = np.sort(rng.integers(0, shape[1] + 1, size=(shape[0], 2)), axis=1)
    ends[rng.random(shape[0]) >= share] = 0
    places = np.arange(shape[1])
    return (places >= ends[:, :1]) & (places < ends[:, 1:])
