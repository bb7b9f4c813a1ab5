"""Recipe of `emoji-tower`, the vision tower that `emoji-vlm` starts from."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from studio.data.scenes import draw_scene
from studio.training.emoji_vlm import build_processor, tower_config
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

_SHARED = 128
_TEXT_LENGTH = 48


class TrainableTower(nn.Module):
    """A vision tower beside a bag of words, and the contrast of the two (CLIP, arXiv:2103.00020)."""

    def __init__(self, tower, vocabulary):
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.from_picture = nn.Linear(width, _SHARED, bias=False)
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.from_words = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, _SHARED))
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, pixel_values, words):
        """Symmetric cross-entropy of pictures (B, 3, 96, 96) against their captions' words (B, T)."""
        pictures = F.normalize(self.from_picture(self.tower(pixel_values).pooler_output), dim=-1)
        counts = (words != 0).sum(dim=1, keepdim=True).clamp(min=1)
        texts = F.normalize(self.from_words(self.words(words).sum(dim=1) / counts), dim=-1)
        logits = self.log_scale.clamp(max=4.6).exp() * pictures @ texts.T
        truth = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class EmojiTower(Recipe):
    """A CLIP vision tower that knows emoji, colours and short words on single tiles."""

    name = "emoji-tower"
    data = "single tiles of the scenes of `studio.data.scenes`, and what is in them"
    defaults = Defaults(steps=3000, batch_size=96, learning_rate=2e-3)

    def build(self, device):
        self.processor = build_processor()
        return TrainableTower(CLIPVisionModel(tower_config()), len(self.processor.tokenizer)).to(device)

    def optimizers(self, module, learning_rate):
        return muon_and_adamw(module, hidden_matrices(module.tower.encoder), learning_rate)

    def batch(self, rng, batch_size, device):
        """Tiles, and their questions with answers as a caption that tells everything that is asked."""
        scenes = [draw_scene(rng, (1, 1), questions=8) for _ in range(batch_size)]
        pictures = np.stack([scene.picture for scene in scenes]).transpose(0, 3, 1, 2) / np.float32(255)
        mean, std = (
            np.asarray(values, dtype=np.float32)[:, None, None]
            for values in (self.processor.image_processor.image_mean, self.processor.image_processor.image_std)
        )
        captions = [
            " ".join(f"{question.text} {question.answer}" for question in scene.questions if question.answer != "no")
            for scene in scenes
        ]
        words = self.processor.tokenizer(
            captions, padding="max_length", truncation=True, max_length=_TEXT_LENGTH, return_tensors="pt"
        )
        return {
            "pixel_values": torch.from_numpy((pictures - mean) / std).to(device),
            "words": words["input_ids"].to(device),
        }

    def load(self, module, folder):
        module.tower.load_state_dict(CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).state_dict())

    def export(self, module, folder):
        save_bf16(module.tower, folder)

    def quality(self, folder):
        """Its size: what the contrast was worth shows in `emoji-vlm`, for the words' half is not kept."""
        return {"parameters": sum(p.numel() for p in CLIPVisionModel.from_pretrained(folder).parameters())}
