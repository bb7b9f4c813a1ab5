"""A reader: a LLaVA-NeXT that learns to answer questions about scenes.

Its vision tower was taught by the kind tower, and stays as it is; projector and words start as they were taught there.
The tokens of an image are nearly all the cost. So many questions are asked about each, and most batches read a random
part of its tokens at their places (as of patches: "FLIP", arXiv:2212.00794), which also prepares for pruned images.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import LlavaNextForConditionalGeneration

from studio.data.scenes import draw_scene
from studio.evaluation.reading import IGNORED, PackedQuestions, pack_questions, packed_logits
from studio.training.attention_supervision import AttentionLoss, cells_of_patches, what_shows
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.reader_network import PATCH, build_model, build_processor
from studio.training.recipe import Defaults, Recipe
from studio.training.tower import PROCESSOR_FILE, load_aligned, open_scenes

TILES = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (2, 2))
QUESTIONS = 24
KEEPS = (0.15, 0.15, 0.2, 0.2, 0.25, 0.3, 1.0)
"""Parts of an image's tokens that a batch reads; each is equally likely."""
_LOOK = 0.5
"""Weight of the attention loss."""
_WORDS_SHARE = 0.05
"""Learning rate of the words over the others': answers need words that the tower's images have not, but what these
have taught is to stay."""


class TrainableReader(nn.Module):
    """A vision-language model with its loss on packed questions."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        model.model.vision_tower.requires_grad_(False)

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        read: torch.Tensor,
        shown: torch.Tensor,
        on_first: torch.Tensor,
        **packed: torch.Tensor,
    ) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, and of the attention on what shows them.

        Args:
            pixel_values, image_sizes: as of LLaVA-NeXT; all images have the same size.
            read: (T,) which of an image's tokens are read, in order.
            shown, on_first: (B, Q, T) bool, which of those show the answers, and (B, Q), as of `AttentionLoss`.
            packed: the tensors of `PackedQuestions`.
        """
        encoded = self.model.model.get_image_features(
            pixel_values=pixel_values, image_sizes=image_sizes, return_dict=True
        )
        features = torch.stack(list(encoded.pooler_output))
        questions = PackedQuestions(**packed)
        with AttentionLoss(self.model.model.language_model) as looking:
            logits = packed_logits(self.model, features[:, read], 1 + read, 1 + features.shape[1], questions)
        answers = F.cross_entropy(logits.float().flatten(0, 1), questions.targets.flatten(), ignore_index=IGNORED)
        last_words = len(read) + questions.ends(shown.shape[1])
        return answers + _LOOK * looking(last_words, shown, on_first)


class ReaderRecipe(Recipe):
    """A LLaVA-NeXT of a CLIP tower and a Llama decoder, 96 px a tile."""

    kind = "reader"
    purpose = "Reads scenes of emoji and words: a LLaVA-NeXT of a CLIP tower and a Llama decoder, 96 px a tile."
    library, task = "transformers", "image-text-to-text"
    defaults = Defaults(steps=4000, batch_size=8, learning_rate=4e-3)
    compiles = False

    def build(self) -> torch.nn.Module:
        open_scenes(self)
        self.processor = build_processor()
        return TrainableReader(build_model(len(self.processor.tokenizer))).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        inner = module.model.model
        words = [inner.get_input_embeddings().weight]
        matrices = hidden_matrices(inner.language_model.layers)
        return muon_and_adamw(module, matrices, learning_rate, tables=words, tables_share=_WORDS_SHARE)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        tiles = TILES[rng.integers(len(TILES))]
        scenes = [draw_scene(rng, tiles, QUESTIONS) for _ in range(size)]
        pixels = self.processor.image_processor([Image.fromarray(scene.image) for scene in scenes], return_tensors="pt")
        texts = [[(question.text, question.answer) for question in scene.questions] for scene in scenes]
        packed = pack_questions(self.processor.tokenizer, texts).tensors()
        cells = cells_of_patches(tiles, PATCH)
        read = np.sort(rng.permutation(len(cells))[: round(len(cells) * KEEPS[rng.integers(len(KEEPS))])])
        shown, on_first = what_shows([scene.questions for scene in scenes], cells[read])
        return {
            "read": torch.from_numpy(read),
            "shown": shown,
            "on_first": on_first,
            "pixel_values": pixels["pixel_values"],
            "image_sizes": torch.as_tensor(pixels["image_sizes"]),
            **packed,
        }

    def load(self, module: Any, folder: Path) -> None:
        """From a whole reader, or what a tower has learned."""
        if (folder / PROCESSOR_FILE).is_file():
            whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            module.model.load_state_dict(whole.state_dict())
        else:
            load_aligned(module.model, folder)

    def export(self, module: Any, folder: Path) -> None:
        save_bf16(module.model, folder)
        self.processor.save_pretrained(folder)

    def quality(self, folder: Path) -> dict:
        from studio.checkpoints.loading import load
        from studio.evaluation.scenes import evaluate_reader

        pipe = load(folder, device=self.device)
        result = evaluate_reader(pipe.model, pipe.processor, methods=())
        kinds = result["by_question"]["none"]["1.0"]
        counts = {name: result[name] for name in ("scenes", "questions", "visual_tokens")}
        return {"accuracy": result["accuracy"]["none"]["1.0"], **kinds, **counts}
