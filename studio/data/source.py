"""The interface of training data: the emoji set or a folder of images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from studio.errors import StudioError

EMOJI = "emoji"


class Examples(ABC):
    """One side of a split: images, with captions or classes where the source has them."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abstractmethod
    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Images (n, 3, size, size), float32 in [-1, 1], always the same for the same indices."""

    def captions(self, indices: Sequence[int], rng: np.random.Generator | None = None) -> list[str]:
        """A caption for each: a random one with `rng`, otherwise the full one."""
        raise StudioError("This data has no captions: write them into a metadata.jsonl with file_name and text.")

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        """Class indices (n,), int64."""
        raise StudioError("This data has no classes: put the images of each class into a sub-folder of its name.")


class Source(ABC):
    """Training data.

    Attributes:
        name: for messages and model cards.
        description: what it is, how many images there are and under which licence, for model cards.
        size: side of its images in pixels.
        checksum: names caches of what is computed from it.
        has_captions: whether examples have captions.
        class_names: the classes in the order of their numbers; None without classes.
        concepts: names of all that a model of this data can know; None where captions are free text.
        train, validation: examples for generators.
        unseen: validation examples for tokenizers (other ones where the source splits differently for them).
        skipped: files that could not be read, with the reasons.
    """

    name: str
    description: str
    size: int
    checksum: str
    has_captions: bool = False
    class_names: list[str] | None = None
    concepts: list[str] | None = None
    train: Examples
    validation: Examples
    unseen: Examples
    skipped: list[tuple[str, str]] = []

    @abstractmethod
    def augmented(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        """Random training images for a tokenizer (count, 3, size, size), float32 in [-1, 1]."""

    def caption_corpus(self) -> list[str]:
        """Texts from which a text tokenizer learns its vocabulary."""
        return self.train.captions(range(len(self.train)))

    def prompt_settings(self) -> dict:
        """What a pipeline over this data is configured with: `lowercase_prompts`, `prompt_completion`."""
        return {"lowercase_prompts": True, "prompt_completion": None}


def open_source(data: str | Path, size: int, *, crop: str = "centre", flip: bool = False) -> Source:
    """Open the source of that name.

    Args:
        data: `"emoji"`, or an image folder (see `studio.data.image_folder`).
        size: side in pixels to which images are brought.
        crop: `"centre"`, `"random"` (another place each time a tokenizer reads it) or `"none"` (squeezed to a square).
        flip: whether training images are mirrored at random.
    """
    if data == EMOJI:
        from studio.data.emoji import EmojiSource

        if crop != "centre" or flip:
            raise StudioError("The emoji set is square and augmented in its own way: leave out --crop and --flip.")
        return EmojiSource(size)
    from studio.data.image_folder import ImageFolder

    return ImageFolder(data, size, crop=crop, flip=flip)
