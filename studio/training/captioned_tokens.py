"""What generators over the tokens of `emoji-vq` learn from: pictures as tokens, with captions drawn anew each time."""

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from studio.checkpoints.bundled import bundled_folder
from studio.data.captions import random_caption
from studio.tokenizers.vq import VQTokenizer
from studio.training.caption_tokenizer import train_caption_tokenizer
from studio.training.token_cache import training_tokens

PLAN_SIZE = 4
"""Side of the grid of regions that a text encoder plans; every caption ends with a plan token for each region."""
CAPTION_LENGTH = 16 + PLAN_SIZE**2
TEXT = {"d_model": 256, "d_kv": 32, "d_ff": 768, "num_layers": 4, "num_heads": 8}


class CaptionedTokens:
    """The training combinations.

    Attributes:
        image_tokenizer: `emoji-vq`.
        tokenizer: the text tokenizer of its captions.
        drawn, tokens: rows (n, 3) of concept, style and background, and their tokens (n, h * w).
    """

    def __init__(self, device):
        folder = bundled_folder("emoji-vq")
        self.image_tokenizer = VQTokenizer.from_pretrained(folder).to(device).eval()
        self.drawn, self.tokens = training_tokens(self.image_tokenizer)
        self.tokenizer = train_caption_tokenizer(CAPTION_LENGTH, PLAN_SIZE**2)

    @property
    def grid_size(self):
        return int(self.tokens.shape[1] ** 0.5)

    def new_text_encoder(self):
        """A T5 encoder for the captions: random weights, in layers that do nothing yet."""
        config = T5Config(
            vocab_size=len(self.tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0,
            eos_token_id=1, **TEXT,
        )  # fmt: skip
        return without_effect(T5EncoderModel(config))

    def encode(self, captions):
        """`input_ids` and `attention_mask` (B, CAPTION_LENGTH)."""
        text = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=CAPTION_LENGTH, return_tensors="pt"
        )
        return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}

    def batch(self, rng, number, device):
        """Captions as of `encode`, and `tokens`, of pictures drawn with a `numpy.random.Generator`."""
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=number))
        captions = [random_caption(*row, rng) for row in self.drawn[chosen].tolist()]
        batch = {**self.encode(captions), "tokens": self.tokens[chosen]}
        return {name: part.to(device) for name, part in batch.items()}


def without_effect(text_encoder):
    """A T5 encoder of which every layer gives on what it gets, until it is trained."""
    for block in text_encoder.encoder.block:
        nn.init.zeros_(block.layer[0].SelfAttention.o.weight)
        nn.init.zeros_(block.layer[1].DenseReluDense.wo.weight)
    return text_encoder
