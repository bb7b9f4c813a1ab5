"""A vision tower for a reader, and the words that its patches stand for.

Patches are what a language model reads. So the mean of some of a cell's patches, behind the projector, is to name what
is in that cell among all words, as the language model's own head would (the alignment that LLaVA, arXiv:2304.08485,
section 4.2, begins with, on single tiles and without the language model). Patches are taken as attention gets them,
each behind a norm, and often few of them: otherwise the tower spreads a name over a whole cell, where no attention can
pick it up. CLS is contrasted with the words of the whole tile (CLIP, arXiv:2103.00020).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel, LlavaNextForConditionalGeneration

from studio.checkpoints.loading import load
from studio.checks import shown
from studio.data.emoji import EmojiSource
from studio.data.scenes import CELL, TILE, WORDS, Scene, draw_scene
from studio.errors import StudioError
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.reader_network import PATCH, build_model, build_processor, load_reader
from studio.training.recipe import Defaults, Recipe

WORDS_FILE = "words.safetensors"
PROCESSOR_FILE = "processor_config.json"
"""What is in the folder of a whole reader only."""
MEASURED = 200
_READ = (2, 4, 6, 9, 18, 36)
"""Patches of a cell that a batch reads."""
_READ_WHEN_MEASURED = 6
_MOSTLY_WORDS = 0.75
"""Of the tiles, those with a word in all cells but one: words are learned last."""
_ACROSS = TILE // CELL
_SIDE = CELL // PATCH
_FEATURE_LAYER = -2
"""The hidden states that a LLaVA hands to its language model."""


class TrainableTower(nn.Module):
    """The parts of a reader in front of its language model.

    Args:
        reader: a LLaVA-NeXT, of which the tower, the projector and the words are trained.
    """

    def __init__(self, reader: Any):
        super().__init__()
        inner = reader.model
        self.tower, self.projector = inner.vision_tower, inner.multi_modal_projector
        self.words, self.norm = reader.get_input_embeddings(), inner.language_model.norm
        self.from_tile = nn.Linear(self.tower.config.hidden_size, self.words.embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, pixel_values: torch.Tensor, cells: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of both words of each cell (B, 4, 2), and the contrast of tiles (B, 3, 96, 96) with theirs.

        `read` (n,) are the numbers of a cell's patches that are read.
        """
        seen = self.tower(pixel_values, output_hidden_states=True)
        logits = self.read_cells(seen.hidden_states[_FEATURE_LAYER][:, 1:], read)
        by_cell = F.cross_entropy(logits[:, :, None].expand(-1, -1, 2, -1).flatten(0, 2), cells.flatten())
        return by_cell + self.contrast(self.from_tile(seen.pooler_output), cells.flatten(1))

    def read_cells(self, patches: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Logits (B, 4, V) of the words of each cell, in raster order, from some of its patches; of all (B, 144, D)."""
        sizes = {"r": _ACROSS, "c": _ACROSS, "i": _SIDE, "j": _SIDE}
        by_cell = rearrange(patches, "b (r i c j) d -> b (r c) (i j) d", **sizes)[:, :, read]
        tokens = self.projector(by_cell)
        means = F.rms_norm(tokens, tokens.shape[-1:]).mean(dim=2)
        return F.linear(self.norm(means), self.words.weight)

    def contrast(self, tiles: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Symmetric cross-entropy of vectors (B, D) of tiles against their words (B, T)."""
        texts = F.normalize(self.words(words).mean(dim=1), dim=-1)
        logits = self.log_scale.clamp(max=4.6).exp() * F.normalize(tiles, dim=-1) @ texts.T
        truth = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class TowerRecipe(Recipe):
    """A CLIP vision tower for single tiles of the scenes.

    Started from a whole reader, it teaches the tower of that reader, leaves all else in it as it is, and makes a whole
    reader again.
    """

    kind = "tower"
    purpose = "A CLIP vision tower that knows emoji, colours and short words on single tiles, and their names."
    library, task = "transformers", "image-feature-extraction"
    defaults = Defaults(steps=3000, batch_size=32, learning_rate=4e-3, warmup=50)
    compiles = False

    def build(self) -> torch.nn.Module:
        open_scenes(self)
        self.processor = build_processor()
        self.reader: Any = None  # the whole one, where a run starts from it
        return TrainableTower(build_model(len(self.processor.tokenizer))).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        matrices = hidden_matrices(module.tower.encoder, module.projector)
        return muon_and_adamw(module, matrices, learning_rate, tables=[module.words.weight], tables_share=1.0)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        """Tiles, and the words for each of their cells: what is there, and the colour behind it."""
        fillings = [{"emoji": 1, "words": 3} if rng.random() < _MOSTLY_WORDS else {} for _ in range(size)]
        scenes = [draw_scene(rng, (1, 1), questions=0, **filling) for filling in fillings]
        images = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2) / np.float32(255)
        mean, std = (
            np.asarray(values, dtype=np.float32)[:, None, None]
            for values in (self.processor.image_processor.image_mean, self.processor.image_processor.image_std)
        )
        number = self.processor.tokenizer.convert_tokens_to_ids
        cells = [[[number(word) for word in cell] for cell in scene.cells] for scene in scenes]
        read = rng.permutation(_SIDE**2)[: _READ[rng.integers(len(_READ))]]
        return {
            "read": torch.from_numpy(read),
            "pixel_values": torch.from_numpy((images - mean) / std),
            "cells": torch.tensor(cells),
        }

    def load(self, module: Any, folder: Path) -> None:
        """From a tower, or a whole reader, of which all but the tower then stays as it is."""
        if not (folder / PROCESSOR_FILE).is_file():
            tower, projector, words = read_aligned(folder)
            module.tower.load_state_dict(tower)
            module.projector.load_state_dict(projector)
            module.words.load_state_dict(words)
            return
        self.reader = load_reader(folder, self.processor.tokenizer)
        theirs = TrainableTower(self.reader)
        module.tower.load_state_dict(theirs.tower.state_dict())
        for name in ("projector", "words", "norm"):
            part = getattr(module, name)
            part.load_state_dict(getattr(theirs, name).state_dict())
            part.requires_grad_(False)

    def export(self, module: Any, folder: Path) -> None:
        if self.reader is not None:
            self.reader.model.vision_tower.load_state_dict(module.tower.state_dict())
            save_bf16(self.reader, folder)
            self.processor.save_pretrained(folder)
            return
        save_bf16(module.tower, folder)
        parts = {"projector": module.projector, "words": module.words}
        tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WORDS_FILE)

    @torch.no_grad()
    def quality(self, folder: Path) -> dict:
        """Of cells of unseen tiles, the shares whose emoji, word or emptiness, and whose colour, few patches name."""
        module = TrainableTower(build_model(len(self.processor.tokenizer))).eval()
        self.load(module, folder)
        rng = np.random.default_rng((1_000_000_007, 0))
        batch = self.batch(rng, MEASURED)
        read = torch.from_numpy(rng.permutation(_SIDE**2)[:_READ_WHEN_MEASURED])
        seen = module.tower(batch["pixel_values"], output_hidden_states=True).hidden_states[_FEATURE_LAYER]
        best = module.read_cells(seen[:, 1:], read).topk(2, dim=-1).indices
        right = (best[..., None] == batch["cells"][:, :, None]).any(dim=2).float()
        words = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(WORDS)))
        is_word = torch.isin(batch["cells"][:, :, 0], words)
        return {
            "words": float(right[is_word][:, 0].mean()),
            "emoji_or_nothing": float(right[~is_word][:, 0].mean()),
            "colours": float(right[:, :, 1].mean()),
            "patches": len(read),
            "tiles": MEASURED,
        }


def read_aligned(folder: Path) -> Any:
    """State dicts of tower, projector and words that a run left in its folder."""
    tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    tensors = load_file(folder / WORDS_FILE)
    projector, words = (
        {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in ("projector", "words")
    )
    return tower, projector, words


def open_scenes(recipe: Recipe) -> None:
    """Opens the emoji set, from which scenes are made; errors: `StudioError` for other data."""
    if not isinstance(recipe.open(TILE), EmojiSource):
        raise StudioError(f"A {recipe.kind} learns from scenes made of the emoji set: leave out --data.")


def target_reader(recipe: Recipe) -> VisualQuestionPipeline:
    """The reader that a recipe's `target` names, in float32; errors: `StudioError` where that is none of scenes."""
    target = recipe.options.target
    if target is None:
        raise StudioError(f"A {recipe.kind} is trained for a reader: name it with --target, such as emoji-vlm.")
    pipe = load(recipe.find(target), device=recipe.device, dtype=torch.float32)
    if not isinstance(pipe, VisualQuestionPipeline) or getattr(pipe.processor, "chat_template", None):
        raise StudioError(f"A {recipe.kind} is for a reader such as emoji-vlm; {shown(target)} is none.")
    return pipe


def read_scenes(processor: Any, scenes: list[Scene]) -> tuple[dict[str, torch.Tensor], list[list[tuple[str, str]]]]:
    """What a reader is given of scenes of one size: `pixel_values` and `image_sizes`, and each one's questions with
    their answers.
    """
    pixels = processor.image_processor([Image.fromarray(scene.image) for scene in scenes], return_tensors="pt")
    texts = [[(question.text, question.answer) for question in scene.questions] for scene in scenes]
    sizes = torch.as_tensor(pixels["image_sizes"])
    return {"pixel_values": pixels["pixel_values"], "image_sizes": sizes}, texts


def load_aligned(reader: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Puts what a tower's run has learned into a LLaVA-NeXT."""
    parts = TrainableTower(reader)
    for part, weights in zip((parts.tower, parts.projector, parts.words), read_aligned(folder), strict=True):
        part.load_state_dict(weights)
