"""`concepts.json`: the vocabulary of a saved pipeline."""

import json
import os
from pathlib import Path

CONCEPTS_FILE = "concepts.json"


def write_known_words(folder: str | os.PathLike, words: list[str], concepts: list[str]) -> None:
    """Writes `concepts.json` into a pipeline's folder.

    Args:
        folder: of the saved pipeline.
        words: the words that the model was trained with.
        concepts: the labels of the subjects that it was trained with.
    """
    content = json.dumps({"words": words, "concepts": concepts}, ensure_ascii=False, indent=0)
    (Path(folder) / CONCEPTS_FILE).write_text(content + "\n", encoding="utf-8")
