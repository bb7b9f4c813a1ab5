"""The network of `emoji-vlm` before training, and what makes its inputs."""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from studio.data.archive import STYLES, load_concepts
from studio.data.backgrounds import NAMES
from studio.data.scenes import TILE, WORDS, subjects

PATCH = 8
PRUNING = {"globalcom2": {"scores": "feature"}, "hired": {"alpha": "proportional"}}
"""Options of pruning methods that suit this tower: CLS of its last layer, which the reader never sees, attends to plain
background, and half the tokens are too many for the thumbnail."""

TOWER: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "hidden_act": "relu",
}
TEXT: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6}
_ROW = 2 * TILE // PATCH + 1
"""Tokens of a row of two tiles, with its newline."""
_PERIODS_BEFORE = 2
ROPE_BASE = (_ROW / (2 * math.pi)) ** (TEXT["hidden_size"] / TEXT["num_attention_heads"] / 2 / _PERIODS_BEFORE)
"""Such that the third period of the rotation is a row, by which attention finds a column."""
_TEMPLATE = "what is in row , column ? how many times there a an colour behind the which word yes no nothing"
_OF_SINGLES = "it style background"
_MARKS = ("?", ",")
"""What is no part of a word; "t-rex" and "o'clock" are one each."""
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""The words of a model, which also are its head."""


def tower_config() -> CLIPVisionConfig:
    """The vision tower: 12 x 12 patches of a 96 px tile, and CLS."""
    return CLIPVisionConfig(image_size=TILE, patch_size=PATCH, **TOWER)


def build_model(vocabulary: int) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT of random weights for images of up to 4 x 4 tiles."""
    config = LlavaNextConfig(
        vision_config=tower_config(),
        text_config=LlamaConfig(
            vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE}, **TEXT,
        ),
        image_token_index=4,
        pruning=PRUNING,  # type: ignore[call-arg]  # transformers keeps what it does not know
        image_grid_pinpoints=_pinpoints(),
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        _attend_to_alike(layer.self_attn)
    return model


@torch.no_grad()
def _attend_to_alike(attention):
    """Lets attention begin as a search for what is alike, and as a copy of it (arXiv:2305.09828, section 3)."""
    nn.init.orthogonal_(attention.q_proj.weight)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def build_processor() -> LlavaNextProcessor:
    """Its processor: tiles of 96 px, and a tokenizer of the words that questions and answers use."""
    words = [*_TEMPLATE.split(), *map(str, range(17)), *NAMES, *WORDS, *(subject.label for subject in subjects())]
    labels = [word for concept in load_concepts() for word in concept.label.lower().split()]
    words += [*_OF_SINGLES.split(), *STYLES, *labels]  # behind all others, whose numbers weights know
    numbers = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "<image>"))}
    for word in words:
        numbers.setdefault(word, len(numbers))
    text = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    text.normalizer = normalizers.Lowercase()
    marks = [pre_tokenizers.Split(mark, "isolated") for mark in _MARKS]
    text.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *marks])
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


def load_reader(folder: Path, tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    """A trained reader, in float32, whose words become those of a tokenizer.

    Vectors of new words are random and short. The table is that of the output too, and long ones would be among the
    likely answers.
    """
    theirs = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    words = tokenizer.get_vocab()
    shared = [word for word in words if word in known]
    state, model = theirs.state_dict(), build_model(len(words))
    table = torch.randn(len(words), model.config.get_text_config().hidden_size) * (0.05 * state[_TABLES[0]].std())
    table[[words[word] for word in shared]] = state[_TABLES[0]][[known[word] for word in shared]]
    model.load_state_dict({**state, **dict.fromkeys(_TABLES, table)})
    return model


def _pinpoints():
    return [[rows * TILE, columns * TILE] for rows in range(1, 5) for columns in range(1, 5)]
