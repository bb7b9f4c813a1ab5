"""The file of a pipeline's folder that says which words the pipeline knows."""

import json
from pathlib import Path

CONCEPTS_FILE = "concepts.json"


def write_known_words(folder, words, concepts):
    """Write `concepts.json` into a pipeline's folder.

    Args:
        folder: where it goes.
        words: the words the model was trained with.
        concepts: the labels of what it can sample.
    """
    content = json.dumps({"words": words, "concepts": concepts}, ensure_ascii=False, indent=0)
    (Path(folder) / CONCEPTS_FILE).write_text(content + "\n", encoding="utf-8")
