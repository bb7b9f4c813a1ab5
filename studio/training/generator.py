"""What recipes of generators share: an image tokenizer, and captions or classes as the condition."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studio.checkpoints.loading import load, load_model
from studio.errors import StudioError
from studio.models.llama_blocks import NULL_CAPTION
from studio.training.recipe import Recipe
from studio.training.text import PLAN_SIZE, Text, load_text, new_text

SHOWN = 8
VALIDATED = 512
"""Validation examples, the first ones, that the validation loss is taken from."""


def grid_of(image_tokenizer: Any) -> int | None:
    """Tokens a side of an image tokenizer's grid; None where they are a row."""
    if getattr(image_tokenizer, "row_length", None):
        return None
    per_cell = getattr(image_tokenizer, "pixels_per_cell", None)
    return image_tokenizer.config.sample_size // (per_cell[0] if per_cell else image_tokenizer.downsample_factor)


class Conditioned(nn.Module):
    """A network, and the text encoder whose states it reads, if it reads captions.

    Args:
        transformer: what is trained.
        text: of the captions; None for classes. Its encoder stays as it is unless it is new.
    """

    transformer: Any
    text_encoder: Any

    def __init__(self, transformer: nn.Module, text: Text | None):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text and text.encoder
        self.is_frozen = text is not None and not text.is_new
        if self.is_frozen:
            self.text_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Conditioned":
        super().train(mode)
        if self.is_frozen:
            self.text_encoder.eval()
        return self

    def condition(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the network is given for `input_ids` and `attention_mask` (B, T), or for `class_labels` (B,)."""
        if self.text_encoder is None:
            return given
        states = self.text_encoder(**given).last_hidden_state
        return {"captions": states, "caption_mask": given["attention_mask"]}


class GeneratorRecipe(Recipe):
    """A recipe whose network is the `transformer` of a pipeline.

    Attributes:
        pipeline: the class of what is exported.
        tokenizers: the classes that its image tokenizer may have, in words, for errors.
        image_tokenizer: frozen, once `prepare` was called.
        text: of the captions, or None for classes.
    """

    pipeline: type
    takes = frozenset({"size", "dim", "layers", "tokenizer", "text_encoder"})
    uses_plan = True
    tokenizers: tuple[type, ...]

    def prepare(self) -> None:
        """Loads the image tokenizer, opens the data at its size, and makes or loads the text encoder.

        Raises:
            StudioError: one of these does not fit to the kind or to the others.
        """
        options = self.options
        if options.tokenizer is None:
            kinds = " or ".join(kind.__name__ for kind in self.tokenizers)
            raise StudioError(f"{self.kind} needs an image tokenizer ({kinds}): name one with --tokenizer.")
        tokenizer: Any = load(self.find(options.tokenizer), device=self.device, dtype=torch.float32)
        if not issubclass(type(tokenizer), self.tokenizers):
            kinds = " or ".join(kind.__name__ for kind in self.tokenizers)
            found = type(tokenizer).__name__
            raise StudioError(f"{self.kind} is trained on the tokens of a {kinds}; {options.tokenizer} is a {found}.")
        self.image_tokenizer = tokenizer.requires_grad_(False)
        size = tokenizer.config.sample_size
        if options.size not in (None, size):
            raise StudioError(f"The tokenizer {options.tokenizer} reads images of {size} px, not {options.size}.")
        self.open(size)
        self.text = self._text()

    def _text(self):
        source, given = self.source, self.options.text_encoder
        if source.has_captions:
            if given:
                return load_text(self.find(given), source)
            return new_text(source, plan_size=PLAN_SIZE if self._fits_a_plan() else 0)
        if source.class_names is None:
            raise StudioError(
                f"{source.name} has neither captions (metadata.jsonl or metadata.csv) nor sub-folders of classes: "
                f"{self.kind} needs one of them."
            )
        if given:
            raise StudioError(f"{source.name} has classes and no captions: leave out --text-encoder.")
        return None

    def _fits_a_plan(self):
        grid = grid_of(self.image_tokenizer)
        return self.uses_plan and (grid is None or grid % PLAN_SIZE == 0)

    def condition_shape(self) -> dict:
        """What the configuration of the network says of its condition."""
        if self.text is None:
            return {"num_classes": len(self.source.class_names or ())}
        plan = {"plan_size": self.text.plan_size} if self.uses_plan else {}
        return {"num_classes": None, "caption_dim": self.text.dim, "caption_length": self.text.length, **plan}

    def chosen(self, rng: np.random.Generator, size: int, training: bool) -> tuple[np.ndarray, dict]:
        """Numbers (size,) of random examples, and their condition: a random wording of a caption, or a class."""
        examples = self.source.train if training else self.source.validation
        count = len(examples) if training else min(VALIDATED, len(examples))
        indices = rng.integers(count, size=size)
        listed = indices.tolist()
        if self.text is None:
            return indices, {"class_labels": examples.labels(listed)}
        return indices, self.text.encode(examples.captions(listed, rng))

    def text_matrices(self, module: Conditioned) -> list[nn.Parameter]:
        """Hidden matrices of a text encoder that is trained along."""
        if module.text_encoder is None or module.is_frozen:
            return []
        return [p for p in module.text_encoder.encoder.block.parameters() if p.ndim == 2 and min(p.shape) > 32]

    def load(self, module: Any, folder: Path) -> None:
        self.load_transformer(module.transformer, folder)
        if module.text_encoder is not None and not module.is_frozen and (folder / "text_encoder").is_dir():
            module.text_encoder.load_state_dict(load_text(folder, self.source).encoder.state_dict())

    def load_transformer(self, transformer: Any, folder: Path) -> None:
        """Gives the network the weights of a trained pipeline's.

        Where captions have another length, the null caption stays the run's own: it is fixed, not learned.
        """
        weights = load_model(type(transformer), folder / "transformer", torch.float32).state_dict()
        ours = transformer.state_dict()
        other = [key for key in weights if key.endswith(NULL_CAPTION) and weights[key].shape != ours[key].shape]
        transformer.load_state_dict(weights | {key: ours[key] for key in other})

    def pipeline_of(self, module: Any, image_tokenizer: torch.nn.Module | None = None) -> Any:
        """The whole pipeline around the trained parts, with what prompts may leave open."""
        text = (module.text_encoder, self.text.tokenizer) if self.text else ()
        names = self.source.class_names or ()
        settings = self.source.prompt_settings() if self.text else {"id2label": dict(enumerate(names))}
        parts = (image_tokenizer or self.image_tokenizer, module.transformer, *text)
        pipe = self.pipeline(*parts, **settings, **self.sampling)
        pipe.vocabulary = self.text and self.text.vocabulary
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_pipeline(self, folder: Path, module: Any, image_tokenizer: nn.Module | None = None) -> None:
        """Writes the whole pipeline in bfloat16."""
        copied = copy.deepcopy(module).to(torch.bfloat16).eval()
        tokenizer = copy.deepcopy(image_tokenizer or self.image_tokenizer).to(torch.bfloat16)
        self.pipeline_of(copied, tokenizer).save_pretrained(folder)

    def export(self, module: Any, folder: Path) -> None:
        self.save_pipeline(folder, module)

    def conditions(self, count: int) -> dict:
        """Arguments of a pipeline for the first validation examples."""
        indices = range(min(count, len(self.source.validation)))
        if self.text is None:
            return {"class_labels": self.source.validation.labels(indices).tolist()}
        return {"prompt": self.source.validation.captions(indices)}

    def samples(self, module: Any) -> torch.Tensor | None:
        """True images of validation examples, and what the model makes of their captions or classes."""
        return self.sampled(self.pipeline_of(module))

    def sampled(self, pipe: Any, **settings: Any) -> torch.Tensor:
        """Rows of images for `samples`, by a pipeline."""
        count = min(SHOWN, len(self.source.validation))
        truth = self.source.validation.images(range(count)) / 2 + 0.5
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        made = pipe(**self.conditions(count), generator=generators, output_type="pt", **settings)
        return torch.stack((truth, made.images.float().cpu()))

    def quality(self, folder: Path) -> dict:
        from studio.evaluation.generators import evaluate_generator

        pipe = load(folder, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        return evaluate_generator(pipe, source=self.source)
