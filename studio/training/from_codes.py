"""What recipes share that teach a network to draw the stacks of codes of `emoji-rvq` from words."""

from abc import abstractmethod

import torch
from torch import nn

from studio.checkpoints.loading import load
from studio.training.from_words import FromWords, Listening
from studio.training.ingredients import ingredient
from studio.training.token_cache import training_tokens

IMAGE_TOKENIZER = "emoji-rvq"


class ListeningToCodes(Listening):
    """A network, the text encoder, and the quantiser of its codes."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module, quantizer: nn.Module):
        super().__init__(transformer, text_encoder)
        self.quantizer = quantizer


class FromCodes(FromWords):
    """A recipe over these codes.

    Attributes:
        image_tokenizer: `emoji-rvq`.
        drawn, codes: the training combinations, rows (n, 3), and their codes (n, L, D).
    """

    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, codes of emoji-rvq"

    def build(self, device):
        self.listen(device)
        self.image_tokenizer = load(ingredient(IMAGE_TOKENIZER), device=device, dtype=torch.float32)
        self.drawn, codes = training_tokens(self.image_tokenizer)
        self.codes = codes.unflatten(1, (-1, self.image_tokenizer.config.depth))
        return self.trainable(device).to(device)

    @abstractmethod
    def trainable(self, device: torch.device) -> ListeningToCodes:
        """The module around a network of random weights."""

    def code_shape(self) -> dict:
        """What the configuration of a network says of these codes."""
        tables = self.image_tokenizer.codebooks
        return {"depth": len(tables), "vocab_size": max(map(len, tables)), "code_dim": tables[0].shape[1]}

    def export(self, module, folder):
        self.save_pipeline(folder, self.image_tokenizer, module)
