"""A reader: a LLaVA-NeXT that learns to answer questions about scenes and about single emoji.

It starts from what a tower has learned, or from a whole reader, and learns as a whole, its tower too. It reads all
tokens of its images: one that learns from random parts of them cannot count, because how much of its attention an emoji
gets then says little about how often it is there.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checks import check_integer, check_number
from studio.data.scenes import TILE, draw_scene, draw_single
from studio.evaluation.reading import IGNORED, PackedQuestions, pack_questions, packed_logits
from studio.training.attention_supervision import AttentionLoss, cells_of_patches, what_shows
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.reader_network import PATCH, build_model, build_processor, load_reader
from studio.training.recipe import Defaults, Recipe
from studio.training.tower import PROCESSOR_FILE, load_aligned, open_scenes, read_scenes

TILES = ((1, 1), (1, 2), (2, 1), *((2, 2),) * 5, *((3, 3),) * 2, *((4, 4),) * 2)
"""Rows and columns of tiles of a batch's scenes; each entry is equally likely."""
_USUAL = 4
"""Tiles of the scenes that a batch's size is about; of larger ones a batch has fewer, of smaller ones more."""
SIDES = (64, 64, 64, 128)
"""Their sides in pixels; one of 128 px is read as 2 x 2 tiles."""
QUESTIONS = 24
MEASURED = ((2, 2), (3, 3), (4, 4))
"""Tiles of the scenes by which a reader is measured."""
_LOOK = 0.5
"""Weight of the attention loss."""


class TrainableReader(nn.Module):
    """A vision-language model with its loss on packed questions."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        tower = model.model.vision_tower
        for unseen in (tower.encoder.layers[-1], tower.post_layernorm):  # behind the features that are read
            unseen.requires_grad_(False)

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        shown: torch.Tensor,
        on_first: torch.Tensor,
        **packed: torch.Tensor,
    ) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, and of the attention on what shows them.

        Args:
            pixel_values, image_sizes: as of LLaVA-NeXT; all images have the same size.
            shown, on_first: (B, Q, T) bool, which of an image's tokens show the answers, and (B, Q), as of
                `AttentionLoss`.
            packed: the tensors of `PackedQuestions`.
        """
        encoded = self.model.model.get_image_features(
            pixel_values=pixel_values, image_sizes=image_sizes, return_dict=True
        )
        features = torch.stack(list(encoded.pooler_output))
        questions = PackedQuestions(**packed)
        with AttentionLoss(self.model.model.language_model) as looking:
            places = 1 + torch.arange(features.shape[1], device=features.device)
            logits = packed_logits(self.model, features, places, 1 + features.shape[1], questions)
        answers = F.cross_entropy(logits.float().flatten(0, 1), questions.targets.flatten(), ignore_index=IGNORED)
        last_words = features.shape[1] + questions.ends(shown.shape[1])
        return answers + _LOOK * looking(last_words, shown, on_first)


class ReaderRecipe(Recipe):
    """A LLaVA-NeXT of a CLIP tower and a Llama decoder, 96 px a tile."""

    kind = "reader"
    purpose = (
        "Reads scenes of emoji and words, and single emoji: a LLaVA-NeXT of a CLIP tower and a Llama decoder, 96 px a "
        "tile."
    )
    library, task = "transformers", "image-text-to-text"
    defaults = Defaults(steps=4000, batch_size=8, learning_rate=4e-3)
    model = {
        "max_tiles": 4,  # rows and columns of tiles of the largest scenes
        "single_share": 0.25,  # of the batches, those of single emoji
        "embedding_lr": 0.05,  # learning rate of token embeddings over the others': what a tower taught them is to stay
    }
    compiles = False

    def build(self) -> torch.nn.Module:
        check_integer("max_tiles", self.model["max_tiles"], 1, 4)
        check_number("single_share", self.model["single_share"], 0, 1)
        open_scenes(self)
        self.processor = build_processor()
        return TrainableReader(build_model(len(self.processor.tokenizer))).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        inner = module.model.model
        words = [inner.get_input_embeddings().weight]
        matrices = hidden_matrices(inner.language_model.layers, inner.vision_tower.encoder.layers[:-1])
        return muon_and_adamw(module, matrices, learning_rate, tables=words, tables_share=self.model["embedding_lr"])

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        if rng.random() < self.model["single_share"]:
            side = SIDES[rng.integers(len(SIDES))]
            tiles = (-(-side // TILE),) * 2
            scenes = [draw_single(rng, side, held_out=not training) for _ in range(_images(size, tiles))]
            cells = torch.zeros_like(cells_of_patches(tiles, PATCH))  # all of it shows all there is
        else:
            allowed = [tiles for tiles in TILES if max(tiles) <= self.model["max_tiles"]]
            tiles = allowed[rng.integers(len(allowed))]
            scenes = [draw_scene(rng, tiles, QUESTIONS) for _ in range(_images(size, tiles))]
            cells = cells_of_patches(tiles, PATCH)
        pixels, texts = read_scenes(self.processor, scenes)
        packed = pack_questions(self.processor.tokenizer, texts).tensors()
        shown, on_first = what_shows([scene.questions for scene in scenes], cells)
        return {
            "shown": shown,
            "on_first": on_first,
            **pixels,
            **packed,
        }

    def load(self, module: Any, folder: Path) -> None:
        """From a whole reader, or what a tower has learned."""
        if (folder / PROCESSOR_FILE).is_file():
            module.model.load_state_dict(load_reader(folder, self.processor.tokenizer).state_dict())
        else:
            load_aligned(module.model, folder)

    def export(self, module: Any, folder: Path) -> None:
        save_bf16(module.model, folder)
        self.processor.save_pretrained(folder)

    def quality(self, folder: Path) -> dict:
        from studio.checkpoints.loading import load
        from studio.evaluation.scenes import evaluate_reader, evaluate_singles

        pipe = load(folder, device=self.device)
        measured = {}
        for tiles in MEASURED:
            result = evaluate_reader(pipe.model, pipe.processor, methods=(), tiles=tiles)
            name = "x".join(map(str, tiles))
            measured[f"accuracy of {name} tiles"] = result["accuracy"]["none"]["1.0"]
            kinds = result["by_question"]["none"]["1.0"]
            measured |= {f"{kind} of {name} tiles": share for kind, share in kinds.items()}
        single = evaluate_singles(pipe.model, pipe.processor)
        measured |= {f"{kind} of single emoji": share for kind, share in single["by_question"].items()}
        return {**measured, "scenes": result["scenes"], "questions": result["questions"], "images": single["images"]}


def _images(size: int, tiles: tuple[int, int]) -> int:
    """Images of so many tiles that cost about as much as `size` usual ones."""
    return max(1, size * _USUAL // (tiles[0] * tiles[1]))
