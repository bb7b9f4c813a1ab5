"""A text encoder that learns to plan the images that captions name, before a generator samples them.

A token model of small images reads most of its next token off the tokens before, so that little gradient reaches the
words. Predicting every code of the image from the caption alone has no such short cut, and costs a hundredth of the
time. The prediction of a region is linear in the state of one plan token, so that a token model finds what belongs into
a cell with one look at one state. (Tokens that only hold states are the registers of arXiv:2309.16588.)
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn

from studio.checkpoints.loading import load
from studio.errors import StudioError
from studio.tokenizers.vq import VQTokenizer
from studio.training.caches import cached_tokens, tokens_of
from studio.training.export import save_bf16
from studio.training.generator import VALIDATED, grid_of
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe
from studio.training.text import PLAN_SIZE, load_text, new_text

HEAD_FILE = "head.safetensors"


class PlanningTextEncoder(nn.Module):
    """Codes of images (B, grid_size**2, code_dim), from the states of the last `plan_size**2` caption tokens.

    Args:
        text_encoder: every caption that it reads ends with the plan tokens, one a region in raster order.
        grid_size: side of the token grid; a multiple of `plan_size`.
        codebook: code vectors (V, code_dim).
    """

    codebook: torch.Tensor

    def __init__(self, text_encoder: Any, grid_size: int, plan_size: int, codebook: torch.Tensor):
        super().__init__()
        self.text_encoder, self.plan_size, self.cells = text_encoder, plan_size, grid_size // plan_size
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        self.head = nn.Linear(text_encoder.config.d_model, self.cells**2 * codebook.shape[1])

    def plan(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """States (B, plan_size**2, d_model) of the plan tokens of captions (B, T), padded on the right."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        number = self.plan_size**2
        places = attention_mask.sum(1, keepdim=True) - number + torch.arange(number, device=states.device)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def predict(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Predicted code vectors (B, grid_size**2, code_dim)."""
        sizes = {"r": self.plan_size, "i": self.cells, "j": self.cells}
        return rearrange(self.head(self.plan(input_ids, attention_mask)), "b (r c) (i j d) -> b (r i c j) d", **sizes)

    def forward(self, tokens: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of the predicted code from the true one, for tokens (B, n)."""
        predicted = self.predict(input_ids, attention_mask).float()
        return (predicted - self.codebook[tokens]).square().sum(-1).mean()


class TextEncoderRecipe(Recipe):
    """A T5 encoder for captions, with plan tokens."""

    kind = "text-encoder"
    purpose = "Reads captions for a generator, and predicts in its last states what belongs into each region."
    task = "text-encoder"
    defaults = Defaults(steps=3000, batch_size=256, learning_rate=8e-3, warmup=50, cooldown=0.4)
    takes = frozenset({"size", "dim", "layers", "tokenizer"})
    model = {"plan_size": PLAN_SIZE}

    def build(self) -> torch.nn.Module:
        if self.options.tokenizer is None:
            raise StudioError("text-encoder predicts the codes of an image tokenizer: name a VQ with --tokenizer.")
        folder = self.find(self.options.tokenizer)
        self.image_tokenizer = load(folder, device=self.device, dtype=torch.float32)
        if not isinstance(self.image_tokenizer, VQTokenizer):
            raise StudioError(f"text-encoder predicts the codes of a VQTokenizer; {self.options.tokenizer} is another.")
        size = self.image_tokenizer.config.sample_size
        if self.options.size not in (None, size):
            name, given = self.options.tokenizer, self.options.size
            raise StudioError(f"The tokenizer {name} reads images of {size} px, not {given}.")
        self.open(size)
        if not self.source.has_captions:
            raise StudioError(f"{self.source.name} has no captions, which text-encoder learns from.")
        self.tokens = cached_tokens(self.image_tokenizer, self.source)
        self.unseen = torch.from_numpy(tokens_of(self.image_tokenizer, self.source.validation, VALIDATED))
        self.grid_size = grid_of(self.image_tokenizer)
        if self.grid_size % self.model["plan_size"]:
            raise StudioError(f"plan_size must divide the grid of {self.grid_size} tokens a side.")
        self.text = new_text(
            self.source, plan_size=self.model["plan_size"], dim=self.options.dim, layers=self.options.layers
        )
        return self._planning(self.text.encoder)

    def _planning(self, encoder):
        codebook = self.image_tokenizer.codebook
        return PlanningTextEncoder(encoder, self.grid_size, self.model["plan_size"], codebook).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        matrices = hidden_matrices(module.text_encoder.encoder)
        return muon_and_adamw(module, matrices, learning_rate, tables=[module.text_encoder.shared.weight])

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        examples, tokens = (
            (self.source.train, self.tokens) if training else (self.source.validation, self.unseen)
        )  # fmt: skip
        indices = rng.integers(len(tokens), size=size)
        return {"tokens": tokens[torch.from_numpy(indices)], **self._encoded(examples.captions(indices.tolist(), rng))}

    def _encoded(self, captions):
        """On a CPU padding costs time; on CUDA shapes that stay the same are worth more."""
        return self.text.encode(captions, shorten=self.device.type == "cpu")

    def load(self, module: Any, folder: Path) -> None:
        """A text encoder with fewer layers starts the first ones; a head of other sizes is left at random."""
        weights = load_text(folder, self.source).encoder.state_dict()
        module.text_encoder.load_state_dict(module.text_encoder.state_dict() | weights)
        if (folder / HEAD_FILE).is_file():
            head = load_file(folder / HEAD_FILE)
            if all(head[key].shape == value.shape for key, value in module.head.state_dict().items()):
                module.head.load_state_dict(head)

    def export(self, module: Any, folder: Path) -> None:
        save_bf16(module.text_encoder, folder / "text_encoder")
        self.text.tokenizer.save_pretrained(folder / "tokenizer")
        save_file({name: part.contiguous() for name, part in module.head.state_dict().items()}, folder / HEAD_FILE)

    def samples(self, module: Any) -> torch.Tensor | None:
        """True images of validation examples, and what the tokenizer decodes of the predicted codes."""
        examples, count = self.source.validation, 8
        indices = range(min(count, len(examples)))
        text = {name: part.to(self.device) for name, part in self.text.encode(examples.captions(indices)).items()}
        distance = torch.cdist(module.predict(**text), module.codebook[None])
        tokens = distance.argmin(dim=-1).unflatten(1, (self.grid_size, self.grid_size))
        rows = torch.stack((examples.images(indices).to(self.device), self.image_tokenizer.decode(tokens)))
        return (rows / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def quality(self, folder: Path) -> dict:
        """Of validation examples: mean squared distance from the true codes, and the share of variance explained."""
        module = self._planning(load_text(folder, self.source).encoder).eval()
        module.head.load_state_dict(load_file(folder / HEAD_FILE))
        indices = np.arange(len(self.unseen))
        text = self.text.encode(self.source.validation.captions(indices.tolist()))
        codes = module.codebook[self.unseen[torch.from_numpy(indices)].to(self.device)]
        distance = (module.predict(**{k: v.to(self.device) for k, v in text.items()}) - codes).square().sum(-1).mean()
        variance = (codes - codes.mean((0, 1))).square().sum(-1).mean()
        return {"distance": float(distance), "explained": float(1 - distance / variance), "samples": len(indices)}
