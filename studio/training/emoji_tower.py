"""Recipe of `emoji-tower`, the vision tower that `emoji-vlm` starts from."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce
from torch import nn
from transformers import CLIPVisionModel

from studio.data.scenes import CELL, TILE, draw_scene
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.reader import build_processor, tower_config
from studio.training.recipe import Defaults, Recipe

_SHARED = 128
_SIDE = TILE // CELL
_FEATURE_LAYER = -2
"""The hidden states that a LLaVA hands to its language model."""


class TrainableTower(nn.Module):
    """A vision tower beside a bag of words, and the contrast of the two (CLIP, arXiv:2103.00020), twice.

    CLS is contrasted with all that is in a tile, and the mean of a cell's patches with what is in that cell (regions
    as of arXiv:2112.09106), since patches are what a language model will read.
    """

    def __init__(self, tower, vocabulary):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.from_tile = nn.Linear(width, _SHARED, bias=False)
        self.from_cell = nn.Linear(width, _SHARED, bias=False)
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.from_words = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, _SHARED))
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, pixel_values, words):
        """Mean of both contrasts, for tiles (B, 3, 96, 96) and the words (B, 4, T) of their cells in raster order."""
        seen = self.tower(pixel_values, output_hidden_states=True)
        patches = seen.hidden_states[_FEATURE_LAYER][:, 1:]
        side = int(patches.shape[1] ** 0.5) // _SIDE
        cells = reduce(patches, "b (r i c j) d -> (b r c) d", "mean", r=_SIDE, c=_SIDE, i=side, j=side)
        by_cell = self.contrast(self.from_cell(cells), words.flatten(0, 1))
        return (by_cell + self.contrast(self.from_tile(seen.pooler_output), words.flatten(1))) / 2

    def contrast(self, pictures, words):
        """Symmetric cross-entropy of pictures (B, D) against bags of words (B, T); equal bags are all right."""
        words = words.sort(dim=1).values
        bags, which = words.unique(dim=0, return_inverse=True)
        counts = (bags != 0).sum(dim=1, keepdim=True).clamp(min=1)
        texts = F.normalize(self.from_words(self.words(bags).sum(dim=1) / counts), dim=-1)
        logits = self.log_scale.clamp(max=4.6).exp() * F.normalize(pictures, dim=-1) @ texts.T
        right = F.one_hot(which, len(bags)).to(logits.dtype)
        by_text = -(logits.log_softmax(dim=0) * right).sum(dim=0) / right.sum(dim=0)
        return (F.cross_entropy(logits, which) + by_text.mean()) / 2


class EmojiTower(Recipe):
    """A CLIP vision tower that knows emoji, colours and short words on single tiles."""

    name = "emoji-tower"
    data = "single tiles of the scenes of `studio.data.scenes`, and what is in their cells"
    defaults = Defaults(steps=600, batch_size=32, learning_rate=4e-3, warmup=50)

    def build(self, device):
        self.processor = build_processor()
        return TrainableTower(CLIPVisionModel(tower_config()), len(self.processor.tokenizer)).to(device)

    def optimizers(self, module, learning_rate):
        matrices = hidden_matrices(module.tower.encoder)
        return muon_and_adamw(module, matrices, learning_rate, tables=[module.words.weight])

    def batch(self, rng, batch_size, device):
        """Tiles, and the words for each of their cells."""
        scenes = [draw_scene(rng, (1, 1), questions=0) for _ in range(batch_size)]
        pictures = np.stack([scene.picture for scene in scenes]).transpose(0, 3, 1, 2) / np.float32(255)
        mean, std = (
            np.asarray(values, dtype=np.float32)[:, None, None]
            for values in (self.processor.image_processor.image_mean, self.processor.image_processor.image_std)
        )
        captions = [caption for scene in scenes for caption in scene.cells]
        words = self.processor.tokenizer(captions, padding=True, add_special_tokens=False, return_tensors="pt")
        return {
            "pixel_values": torch.from_numpy((pictures - mean) / std).to(device),
            "words": words["input_ids"].unflatten(0, (batch_size, -1)).to(device),
        }

    def load(self, module, folder):
        module.tower.load_state_dict(CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).state_dict())

    def export(self, module, folder):
        save_bf16(module.tower, folder)

    def quality(self, folder):
        """Its size: what the contrast was worth shows in `emoji-vlm`, for the words' half is not kept."""
        return {"parameters": sum(p.numel() for p in CLIPVisionModel.from_pretrained(folder).parameters())}
