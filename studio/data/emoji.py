"""The Fluent Emoji set as training data.

Tokenizers learn from all concepts but those held out for them; generators from all combinations of concept, style and
background but those held out. A combination has exactly one true image and many captions.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from studio.data.archive import ARCHIVE, STYLES, load_concepts, load_images
from studio.data.augmentation import move
from studio.data.backgrounds import NAMES, PALETTE, compose, render
from studio.data.captions import full_caption, names, prompt_completion, random_caption
from studio.data.source import Examples, Source
from studio.data.splits import combinations, concepts


class Combinations(Examples):
    """Combinations as examples.

    Attributes:
        rows: (n, 3) of concept, style and background.
    """

    def __init__(self, rows: np.ndarray, size: int):
        self.rows, self.size = rows, size

    def __len__(self):
        return len(self.rows)

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        return render(load_images(self.size), self.rows[np.asarray(indices)]) * 2 - 1

    def captions(self, indices: Sequence[int], rng: np.random.Generator | None = None) -> list[str]:
        rows = self.rows[np.asarray(indices)].tolist()
        if rng is None:
            return [full_caption(*row) for row in rows]
        return [random_caption(concept, style, background, rng) for concept, style, background in rows]


class EmojiSource(Source):
    """The set at a resolution of up to 128 px."""

    name = "emoji"
    has_captions = True
    skipped = []

    def __init__(self, size: int):
        self.size = size
        seen, unseen = (concepts(held_out=side) for side in (False, True))
        self.pixels = load_images(size)[seen].reshape(-1, size, size, 4)
        self.train = Combinations(np.array(combinations(held_out=False)), size)
        self.validation = Combinations(_shuffled(combinations(held_out=True)), size)
        every = [(c, style, ground) for c in unseen for style in range(len(STYLES)) for ground in range(len(NAMES))]
        self.unseen = Combinations(_shuffled(every), size)
        self.checksum = hashlib.sha256(ARCHIVE.read_bytes() + b"%d" % size).hexdigest()
        self.concepts = [concept.label for concept in load_concepts()]
        self.description = (
            f"Fluent Emoji (MIT): {len(load_concepts())} concepts in {len(STYLES)} styles on {len(NAMES)} backgrounds; "
            f"{len(unseen)} concepts are held out from tokenizers, {len(self.validation)} combinations from generators"
        )

    def augmented(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        """Flipped, moved, zoomed, at times recoloured; 60 % on named backgrounds, the rest on any colour."""
        chosen = self.pixels[rng.integers(len(self.pixels), size=count)]
        named = PALETTE[rng.integers(len(PALETTE), size=count)]
        behind = np.where(rng.random((count, 1)) < 0.6, named, rng.random((count, 3)))
        images = torch.from_numpy(compose(chosen, behind))
        flip = torch.from_numpy(rng.random(count) < 0.5)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        colours = torch.from_numpy(behind).float()
        images = move(images, colours, rng, share=0.5, zoom=(0.8, 1.6), angle=0.3, shift=0.2)
        recoloured = torch.from_numpy(rng.random(count) < 0.15)
        order = torch.from_numpy(np.stack([rng.permutation(3) for _ in range(count)]))
        permuted = images.gather(1, order[:, :, None, None].expand_as(images))
        return torch.where(recoloured[:, None, None, None], permuted, images).clamp(0, 1) * 2 - 1

    def caption_corpus(self) -> list[str]:
        """All names and tags of all concepts, and captions with every style and background."""
        texts = [text for concept, known in zip(load_concepts(), names()) for text in (*known, *concept.tags)]
        return texts + [
            full_caption(concept.index, number % len(STYLES), (concept.index + number) % len(NAMES))
            for concept in load_concepts()
            for number in range(4)
        ]

    def prompt_settings(self) -> dict:
        return {"lowercase_prompts": True, "prompt_completion": prompt_completion()}


def _shuffled(rows):
    """Rows in a fixed order that mixes concepts, so that the first few are a fair sample."""
    return np.random.default_rng(0).permutation(np.array(rows))
