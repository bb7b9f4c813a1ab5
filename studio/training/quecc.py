"""QueCC: a compressor of images for a reader, which stays as it is (arXiv:2411.03312; `studio.pruning.quecc`).

Every question about a scene is read with tokens of its own, and the compressor learns the answers. In the first part of
a run it also learns what the reader predicts from the whole image, for all tokens (distillation, arXiv:1503.02531).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.data.scenes import draw_scene
from studio.evaluation.reading import IGNORED, PackedQuestions, compressed_logits, pack_questions, packed_logits
from studio.pruning.quecc import FOLDER, TOKENS, Compressor
from studio.training.export import load_component, save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe
from studio.training.tower import open_scenes, read_scenes, target_reader

TILES = 2
QUESTIONS = 12
_DISTILLED = 0.3
"""Share of a run in which the whole image's answers are learned too."""


class TrainableCompressor(nn.Module):
    """A compressor, and its reader, which stays as it is."""

    def __init__(self, compressor: Compressor, reader: Any):
        super().__init__()
        self.compressor, self.reader = compressor, reader.requires_grad_(False)

    def train(self, mode: bool = True) -> "TrainableCompressor":
        super().train(mode)
        self.reader.eval()
        return self

    def forward(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, tokens: torch.Tensor, **packed: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, and with `whole_...` tensors the divergence from the reader.

        Args:
            pixel_values, image_sizes: of B scenes, as of LLaVA-NeXT.
            tokens: as many as an image becomes, (tokens,).
            packed: the tensors of `PackedQuestions` of B * Q rows, and after "whole_" those of B rows.
        """
        whole = {name.removeprefix("whole_"): packed.pop(name) for name in [*packed] if name.startswith("whole_")}
        alone = PackedQuestions(**packed)
        with torch.no_grad():
            patches = self.compressor.read(self.reader, pixel_values)
        logits = compressed_logits(self.reader, self.compressor, patches, len(tokens), alone)
        answers = alone.targets != IGNORED
        loss = F.cross_entropy(logits[answers].float(), alone.targets[answers])
        if not whole:
            return loss
        taught = self.teach(pixel_values, image_sizes, PackedQuestions(**whole))
        return loss + F.kl_div(
            logits[answers].float().log_softmax(dim=-1), taught, reduction="batchmean", log_target=True
        )

    @torch.no_grad()
    def teach(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, whole: PackedQuestions) -> torch.Tensor:
        """Log-probabilities (n, V) of the reader for the tokens of all answers, from the whole images."""
        encoded = self.reader.model.get_image_features(
            pixel_values=pixel_values, image_sizes=image_sizes, return_dict=True
        )
        features = torch.stack(list(encoded.pooler_output))
        places = 1 + torch.arange(features.shape[1], device=features.device)
        logits = packed_logits(self.reader, features, places, 1 + features.shape[1], whole)
        return logits[whole.targets != IGNORED].float().log_softmax(dim=-1)


class QueCCRecipe(Recipe):
    """A compressor for a LLaVA-NeXT that reads scenes."""

    kind = "quecc"
    purpose = "Reads an image as a few tokens that are made for the question (QueCC), with an unchanged reader."
    origin = "the projector of its reader"
    library, task = "transformers", "image-text-to-text"
    defaults = Defaults(steps=4000, batch_size=8, learning_rate=4e-3)
    takes = frozenset({"target", "tokens"})
    compiles = False

    def build(self) -> torch.nn.Module:
        pipe = target_reader(self)
        self.processor = pipe.processor
        self.tokens = TOKENS if self.options.tokens is None else (self.options.tokens,)
        open_scenes(self)
        return TrainableCompressor(Compressor.for_reader(pipe.model, TILES, self.tokens), pipe.model).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        compressor = module.compressor
        matrices = hidden_matrices(*(part for name, part in compressor.named_children() if name != "pool"))
        return muon_and_adamw(module, matrices, learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        scenes = [draw_scene(rng, (TILES, TILES), QUESTIONS) for _ in range(size)]
        pixels, texts = read_scenes(self.processor, scenes)
        packed = pack_questions(self.processor.tokenizer, [[text] for row in texts for text in row]).tensors()
        if training and self.share < _DISTILLED:
            whole = pack_questions(self.processor.tokenizer, texts).tensors()
            packed |= {f"whole_{name}": part for name, part in whole.items()}
        return {
            **pixels,
            "tokens": torch.zeros(self.tokens[rng.integers(len(self.tokens))]),
            **packed,
        }

    def load(self, module: Any, folder: Path) -> None:
        load_component(module.compressor, folder, FOLDER)

    def export(self, module: Any, folder: Path) -> None:
        save_bf16(module.reader, folder)
        self.processor.save_pretrained(folder)
        save_bf16(module.compressor, folder / FOLDER)

    def quality(self, folder: Path) -> dict:
        from studio.evaluation.scenes import evaluate_compressed

        measured = evaluate_compressed(load(folder, device=self.device))
        shares = {f"accuracy at {tokens} tokens": share for tokens, share in measured.pop("accuracy").items()}
        return {**shares, **measured}
