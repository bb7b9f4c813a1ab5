"""The held-out images, chosen by a hash of names and so independent of order, seed and machine."""

import hashlib

from studio.data.archive import STYLES, load_concepts
from studio.data.backgrounds import NAMES

HELD_OUT_CONCEPTS = 0.05
HELD_OUT_COMBINATIONS = 0.10


def _fraction(key):
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def concept_is_held_out(label: str) -> bool:
    """Whether a concept is held out from the training of all tokenizers (5 % of all)."""
    return _fraction(f"concept/{label}") < HELD_OUT_CONCEPTS


def combination_is_held_out(label: str, style: str, background: str) -> bool:
    """Whether a (concept, style, background) is held out from generators and the judge (10 % of all)."""
    return _fraction(f"combination/{label}/{style}/{background}") < HELD_OUT_COMBINATIONS


def concepts(held_out: bool) -> list[int]:
    """Indices of the concepts of one side of the tokenizers' split."""
    return [concept.index for concept in load_concepts() if concept_is_held_out(concept.label) == held_out]


def combinations(held_out: bool) -> list[tuple[int, int, int]]:
    """(concept index, style index, background index) triples of one side of the generators' split, in archive order."""
    return [
        (concept.index, style_index, background_index)
        for concept in load_concepts()
        for style_index, style in enumerate(STYLES)
        for background_index, background in enumerate(NAMES)
        if combination_is_held_out(concept.label, style, background) == held_out
    ]
