"""Recipe of `emoji-vlm`: a LLaVA-NeXT learns to answer questions about scenes.

Its vision tower was taught by `emoji-tower`, and stays as it is; projector and words start as they were taught there.
The tokens of a picture are nearly all the cost, so that many questions are asked about each.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import LlavaNextForConditionalGeneration

from studio.data.scenes import draw_scene
from studio.evaluation.reading import IGNORED, PackedQuestions, pack_questions, packed_logits
from studio.training.emoji_tower import EmojiTower, load_aligned
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.reader import build_model, build_processor
from studio.training.recipe import Defaults, Recipe

TILES = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (2, 2))
QUESTIONS = 16
TOWER_SHARE = 0.75
"""Steps of `emoji-tower` before, over those of a whole training."""


class TrainableReader(nn.Module):
    """A vision-language model with its loss on packed questions."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        model.model.vision_tower.requires_grad_(False)

    def forward(self, pixel_values, image_sizes, **packed):
        """Mean cross-entropy of the answers' tokens; all pictures have the same size."""
        encoded = self.model.model.get_image_features(
            pixel_values=pixel_values, image_sizes=image_sizes, return_dict=True
        )
        features = torch.stack(list(encoded.pooler_output))
        positions = torch.arange(1, features.shape[1] + 1, device=features.device)
        packed = PackedQuestions(**packed)
        logits = packed_logits(self.model, features, positions, features.shape[1] + 1, packed)
        return F.cross_entropy(logits.float().flatten(0, 1), packed.targets.flatten(), ignore_index=IGNORED)


class EmojiVLM(Recipe):
    """Reads scenes of emoji and words: a LLaVA-NeXT of a CLIP tower and a Llama decoder, 96 px a tile."""

    name = "emoji-vlm"
    data = "scenes of Fluent Emoji and words with questions, drawn without end (`studio.data.scenes`)"
    defaults = Defaults(steps=4000, batch_size=4, learning_rate=4e-3)

    def first(self, steps):
        return EmojiTower(), max(1, int(steps * TOWER_SHARE))

    def build(self, device):
        self.processor = build_processor()
        return TrainableReader(build_model(len(self.processor.tokenizer))).to(device)

    def optimizers(self, module, learning_rate):
        inner = module.model.model
        return muon_and_adamw(module, hidden_matrices(inner.language_model.layers), learning_rate)

    def batch(self, rng, batch_size, device):
        tiles = TILES[rng.integers(len(TILES))]
        scenes = [draw_scene(rng, tiles, QUESTIONS) for _ in range(batch_size)]
        pixels = self.processor.image_processor(
            [Image.fromarray(scene.picture) for scene in scenes], return_tensors="pt"
        )
        texts = [[(question.text, question.answer) for question in scene.questions] for scene in scenes]
        packed = pack_questions(self.processor.tokenizer, texts).tensors()
        return {
            "pixel_values": pixels["pixel_values"].to(device),
            "image_sizes": torch.as_tensor(pixels["image_sizes"]),
            **{name: tensor.to(device) for name, tensor in packed.items()},
        }

    def load(self, module, folder):
        """From an `emoji-vlm`, or what an `emoji-tower` has learned."""
        if (folder / "processor_config.json").is_file():
            whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            module.model.load_state_dict(whole.state_dict())
        else:
            load_aligned(module.model, folder)

    def export(self, module, folder):
        save_bf16(module.model, folder)
        self.processor.save_pretrained(folder)

    def quality(self, folder):
        from studio.checkpoints.loading import load
        from studio.evaluation.scenes import evaluate_reader

        pipe = load(folder)
        result = evaluate_reader(pipe.model, pipe.processor, methods=())
        kinds = result["by_question"]["none"]["1.0"]
        counts = {name: result[name] for name in ("scenes", "questions", "visual_tokens")}
        return {"accuracy": result["accuracy"]["none"]["1.0"], **kinds, **counts}
