"""`concepts.json`: the vocabulary of a saved pipeline; and names that are close to a word."""

import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

CONCEPTS_FILE = "concepts.json"
_NEAREST = 3


def write_known_words(folder: str | os.PathLike, words: list[str], concepts: list[str]) -> None:
    """Writes `concepts.json` into a pipeline's folder.

    Args:
        folder: of the saved pipeline.
        words: the words that the model was trained with.
        concepts: the labels of the subjects that it was trained with.
    """
    content = json.dumps({"words": words, "concepts": concepts}, ensure_ascii=False, indent=0)
    (Path(folder) / CONCEPTS_FILE).write_text(content + "\n", encoding="utf-8")


def nearest_labels(word: str, labels: Sequence[str]) -> list[str]:
    """Up to three labels that contain a word, which is in lower case, or a word like it; the shortest first."""
    containing = sorted((label for label in labels if word in label.lower()), key=len)
    by_word = {part: label for label in reversed(labels) for part in [*label.lower().split(), label.lower()]}
    similar = [by_word[part] for part in get_close_matches(word, by_word, n=_NEAREST, cutoff=0.6)]
    return list(dict.fromkeys([*containing, *similar]))[:_NEAREST]
