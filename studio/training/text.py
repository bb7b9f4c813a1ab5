"""Captions for training: a text encoder that is given and stays as it is, or a small T5 that is trained along."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from studio.data.source import Source
from studio.errors import StudioError
from studio.training.text_tokenizer import known_words, plan_length_of, train_text_tokenizer

PLAN_SIZE = 4
"""Side of the grid of regions that a new text encoder plans; every caption ends with a plan token for each region."""
TEXT = {"d_model": 256, "d_kv": 32, "d_ff": 768, "num_layers": 4, "num_heads": 8}
_FEWEST_TOKENS, _MOST_TOKENS = 12, 96


@dataclass
class Text:
    """A text encoder with its tokenizer.

    Attributes:
        encoder: with the interface of `T5EncoderModel`.
        tokenizer: each of its texts ends with `plan_size**2` plan tokens.
        plan_size: side of the grid of regions that the last states describe; 0 for none.
        is_new: whether the encoder has random weights and is to be trained along.
        vocabulary: words and concepts that it knows; None where any word may do.
    """

    encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    plan_size: int
    is_new: bool
    vocabulary: tuple[list[str], list[str]] | None = None

    @property
    def length(self) -> int:
        """Tokens of a caption, padding included."""
        return self.tokenizer.model_max_length

    def encode(self, captions: list[str], shorten: bool = False) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (n, length) of captions; to `shorten` is to pad to the longest only."""
        padding = "longest" if shorten else "max_length"
        encoded = self.tokenizer(
            captions, padding=padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @property
    def dim(self) -> int:
        """Width of the encoder's states."""
        return self.encoder.config.d_model


def new_text(source: Source, *, plan_size: int = PLAN_SIZE, dim: int | None = None, layers: int | None = None) -> Text:
    """A text tokenizer for a source's captions, and a T5 encoder of random weights in layers that do nothing yet."""
    corpus, plan = source.caption_corpus(), plan_size**2
    tokenizer = train_text_tokenizer(corpus, _MOST_TOKENS + plan, plan)
    longest = max(map(len, tokenizer(corpus)["input_ids"])) - plan
    tokenizer.model_max_length = min(_MOST_TOKENS, max(_FEWEST_TOKENS, longest * 5 // 4)) + plan
    sizes: dict[str, Any] = {**TEXT, "d_model": dim or TEXT["d_model"], "num_layers": layers or TEXT["num_layers"]}
    if dim:
        sizes |= {"d_ff": 3 * dim, "num_heads": max(1, dim // TEXT["d_kv"])}
    config = T5Config(
        vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        **sizes,
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    blocks: Any = encoder.encoder.block
    for block in blocks:
        nn.init.zeros_(block.layer[0].SelfAttention.o.weight)
        nn.init.zeros_(block.layer[1].DenseReluDense.wo.weight)
    vocabulary = (known_words(corpus), source.concepts) if source.concepts else None
    return Text(encoder, tokenizer, plan_size, True, vocabulary)


def load_text(folder: Path, source: Source) -> Text:
    """The text encoder of a pipeline's folder, of a run of the kind text-encoder, or of a folder of transformers.

    Raises:
        StudioError: there is none.
    """
    inside = (folder / "text_encoder").is_dir()
    try:
        encoder = T5EncoderModel.from_pretrained(
            folder / "text_encoder" if inside else folder, dtype=torch.float32, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer" if inside else folder, trust_remote_code=False)
    except Exception as error:
        raise StudioError(f"{folder} holds no T5 text encoder: give a pipeline, or a run of text-encoder.") from error
    plan = plan_length_of(tokenizer)
    if not plan:
        tokenizer.model_max_length = min(tokenizer.model_max_length, _MOST_TOKENS)
    vocabulary = (known_words(source.caption_corpus()), source.concepts) if source.concepts else None
    return Text(encoder.eval(), tokenizer, round(plan**0.5), False, vocabulary)
