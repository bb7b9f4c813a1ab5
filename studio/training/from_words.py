"""What recipes share that teach a network to draw from words: the text encoder of `emoji-ar`, which stays as it is.

Its captions end with plan tokens, whose states hold a guess of the picture.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from studio.checkpoints.loading import load, load_model
from studio.data.captions import open_choices, random_caption
from studio.training.recipe import Recipe

TEXT = "emoji-ar"


class Listening(nn.Module):
    """A network, and the frozen text encoder whose states it reads."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Listening":
        super().train(mode)
        self.text_encoder.eval()
        return self

    def condition(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the network is told of captions (B, T)."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"captions": states, "caption_mask": attention_mask}


class FromWords(Recipe):
    """A recipe whose network is the `transformer` of a pipeline, under captions.

    Attributes:
        pipeline: the class of what is exported.
        drawing: its defaults.
        text: once `listen` was called, a pipeline with the text encoder, the text tokenizer and the words it knows.
    """

    pipeline: type
    drawing: dict

    def listen(self, device: torch.device) -> None:
        """Loads `text`."""
        self.text = load(TEXT, device=device, dtype=torch.float32)

    def caption_shape(self) -> dict:
        """What the configuration of a network says of its captions."""
        config = self.text.transformer.config
        return {"num_classes": None, "caption_dim": config.caption_dim, "caption_length": config.caption_length}

    def planned_shape(self) -> dict:
        """`caption_shape` of a network that reads a plan, with that of the text encoder's captions."""
        return {**self.caption_shape(), "plan_size": self.text.transformer.config.plan_size}

    def captions(self, rows: torch.Tensor, rng, device: torch.device) -> dict[str, torch.Tensor]:
        """Captions drawn for combinations (B, 3), as `input_ids` and `attention_mask` (B, T)."""
        tokenizer = self.text.tokenizer
        texts, length = [random_caption(*row, rng) for row in rows.tolist()], tokenizer.model_max_length
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}

    def load(self, module, folder):
        weights = load_model(type(module.transformer), folder / "transformer", torch.float32)
        module.transformer.load_state_dict(weights.state_dict())

    def save_pipeline(self, folder: Path, image_tokenizer, module: Listening) -> None:
        """Writes the whole pipeline in bfloat16, with the words that it knows, and what prompts may leave open."""
        parts = (image_tokenizer, module.transformer, module.text_encoder)
        image_tokenizer, transformer, text_encoder = (copy.deepcopy(part).to(torch.bfloat16).eval() for part in parts)
        pipe = self.pipeline(
            image_tokenizer,
            transformer,
            text_encoder,
            self.text.tokenizer,
            lowercase_prompts=True,
            open_choices=open_choices(),
            **self.drawing,
        )
        pipe.vocabulary = self.text.vocabulary
        pipe.save_pretrained(folder)

    def quality(self, folder):
        from studio.evaluation.generators import evaluate_generator

        pipe = load(folder)
        pipe.set_progress_bar_config(disable=True)
        return evaluate_generator(pipe)
