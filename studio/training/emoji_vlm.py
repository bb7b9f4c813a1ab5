"""Recipe of `emoji-vlm`."""

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from studio.data.backgrounds import NAMES
from studio.data.scenes import TILE, WORDS, draw_scene, subjects
from studio.evaluation.reading import IGNORED, PackedQuestions, pack_questions, packed_logits
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

PATCH = 8
TOWER = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "hidden_act": "relu",
}
TEXT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6}
TILES = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (2, 2))
QUESTIONS = 32
_TEMPLATE = "what is in row , column ? how many times there a an colour behind the which word yes no nothing"


class TrainableReader(nn.Module):
    """A vision-language model with its loss on packed questions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

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
    defaults = Defaults(steps=6000, batch_size=4, learning_rate=2e-3)

    def build(self, device):
        self.processor = build_processor()
        return TrainableReader(build_model(len(self.processor.tokenizer))).to(device)

    def optimizers(self, module, learning_rate):
        inner = module.model.model
        matrices = hidden_matrices(inner.vision_tower.encoder, inner.language_model.layers)
        return muon_and_adamw(module, matrices, learning_rate)

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
        """From an `emoji-vlm`, or only the vision tower from an `emoji-tower`."""
        if (folder / "processor_config.json").is_file():
            whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            module.model.load_state_dict(whole.state_dict())
        else:
            tower = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
            module.model.model.vision_tower.load_state_dict(tower.state_dict())

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


def tower_config() -> CLIPVisionConfig:
    """The vision tower: 12 x 12 patches of a 96 px tile, and CLS."""
    return CLIPVisionConfig(image_size=TILE, patch_size=PATCH, **TOWER)


def build_model(vocabulary: int) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT of random weights for pictures of up to 4 x 4 tiles."""
    config = LlavaNextConfig(
        vision_config=tower_config(),
        text_config=LlamaConfig(
            vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, **TEXT,
        ),
        image_token_id=4,
        image_grid_pinpoints=_pinpoints(),
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


def build_processor() -> LlavaNextProcessor:
    """Its processor: tiles of 96 px, and a tokenizer of the words that questions and answers use."""
    words = [*_TEMPLATE.split(), *map(str, range(17)), *NAMES, *WORDS, *(subject.label for subject in subjects())]
    numbers = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "<image>"))}
    for word in words:
        numbers.setdefault(word, len(numbers))
    text = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    text.normalizer = normalizers.Lowercase()
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=_pinpoints()
    )
    return LlavaNextProcessor(
        pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _pinpoints():
    return [[rows * TILE, columns * TILE] for rows in range(1, 5) for columns in range(1, 5)]
