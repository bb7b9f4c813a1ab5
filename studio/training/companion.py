"""What recipes share that train a companion of a finished pipeline: a drafter or a student."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from studio.checkpoints.loading import load
from studio.errors import StudioError
from studio.training.export import copy_with_component, load_component
from studio.training.recipe import Recipe

MEASURED = 16
"""Validation captions or classes that are sampled to measure a companion."""


class CompanionRecipe(Recipe):
    """A recipe of a component of the `target` pipeline. What is exported is that pipeline with the component in it.

    Attributes:
        component: the name of the component.
        pipeline: the class that the target must have.
        pipe: the target, once `prepare` was called; its folder is `folder`.
    """

    component: str
    pipeline: type
    pipe: Any
    takes = frozenset({"target"})

    def prepare(self, dtype: torch.dtype | None = torch.float32) -> None:
        """Loads the target and opens the data at its size."""
        if self.options.target is None:
            raise StudioError(f"A {self.kind} is trained for a pipeline: name it with --target.")
        self.folder = self.find(self.options.target)
        pipe: Any = load(self.folder, device=self.device, dtype=dtype)
        if not issubclass(type(pipe), self.pipeline):
            found, wanted = type(pipe).__name__, self.pipeline.__name__
            raise StudioError(f"A {self.kind} is for a {wanted}; {self.options.target} is a {found}.")
        self.pipe = pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.open(self.pipe.image_tokenizer.config.sample_size)
        if self.pipe.takes_text != self.source.has_captions:
            needed = "captions" if self.pipe.takes_text else "classes"
            raise StudioError(f"{self.options.target} is conditioned on {needed}, which {self.source.name} has not.")
        if not self.pipe.takes_text and self.pipe.transformer.config.num_classes != len(self.source.class_names or ()):
            known, given = self.pipe.transformer.config.num_classes, len(self.source.class_names or ())
            raise StudioError(f"{self.options.target} knows {known} classes, and {self.source.name} has {given}.")

    def component_of(self, module: torch.nn.Module) -> torch.nn.Module:
        """The trained component of a module."""
        return getattr(module, self.component)

    def arguments(self, indices: np.ndarray, rng: np.random.Generator | None, training: bool = True) -> dict:
        """A pipeline's `prompt` or `class_labels` for examples."""
        examples = self.source.train if training else self.source.validation
        if self.pipe.takes_text:
            return {"prompt": examples.captions(indices.tolist(), rng)}
        return {"class_labels": examples.labels(indices.tolist()).tolist()}

    def condition(self, indices: np.ndarray, rng: np.random.Generator | None, training: bool = True) -> dict:
        """The states of captions with their mask, or the classes, of examples, on the CPU."""
        given = self.pipe.condition(**self.arguments(indices, rng, training))
        return {name: value.cpu() for name, value in given.items()}

    def load(self, module: Any, folder: Path) -> None:
        load_component(self.component_of(module), folder, self.component)

    def export(self, module: Any, folder: Path) -> None:
        copy_with_component(self.pipe.name_or_path, folder, self.component, self.component_of(module))

    def measured(self, pipe: Any, **settings: Any) -> Any:
        """What a pipeline's call returns for the first validation examples, with their own seeds."""
        count = min(MEASURED, len(self.source.validation))
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return pipe(**self.arguments(np.arange(count), None, training=False), generator=generators, **settings)
