"""Words of a prompt that a bundled model was not trained with, and the nearest known concepts."""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from studio.errors import StudioError
from studio.pipelines.known_words import CONCEPTS_FILE, nearest_labels

_MOST_NAMED = 5
_LONGEST_NAMED = 32
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def read_vocabulary(folder: Path) -> tuple[list[str], list[str]] | None:
    """Read `concepts.json` of a pipeline folder.

    Args:
        folder: a pipeline's folder.

    Returns:
        `(words, concepts)`, two lists of strings, or `None` for a pipeline without such a file (any word may do).

    Raises:
        StudioError: the file is not of the form `{"words": [...], "concepts": [...]}`.
    """
    file = folder / CONCEPTS_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        words, concepts = list(content["words"]), list(content["concepts"])
        if not all(isinstance(text, str) for text in words + concepts):
            raise ValueError("not all words are text")
        return words, concepts
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StudioError(f"{file} is damaged: copy the model again.") from error


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, those with hyphens and apostrophes whole."""
    return _WORD.findall(text.lower())


def unknown_words(prompt: str, words: Collection[str], concepts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name the words of a prompt that a model was not trained with.

    Args:
        prompt: what the user asks for.
        words: the words the model knows, in any case.
        concepts: the labels of what it can sample, such as `"red apple"`.

    Returns:
        A list of `(word, nearest)`: the unknown words in order, each once, with up to three concepts that come close.
    """
    known = {word.lower() for word in words}
    unknown = dict.fromkeys(word for word in words_of(prompt) if word not in known)
    return [(word, nearest_labels(word, concepts)) for word in unknown]


def prompt_warning(pipe: DiffusionPipeline, prompt: str) -> str | None:
    """Name the words that a loaded pipeline does not know, in one sentence.

    Args:
        pipe: what `studio.load` returned.
        prompt: what the user asks for, or `None`.

    Returns:
        The sentence, or `None` when there is nothing to warn of.
    """
    vocabulary = getattr(pipe, "vocabulary", None)
    unknown = unknown_words(prompt, *vocabulary) if vocabulary and prompt else []
    if not unknown:
        return None
    parts = [_named(word, nearest) for word, nearest in unknown[:_MOST_NAMED]]
    if more := len(unknown) - len(parts):
        parts.append(f"{more} more")
    return f"The model does not know {', '.join(parts)}; it will guess."


def _named(word, nearest):
    short = word if len(word) <= _LONGEST_NAMED else f"{word[: _LONGEST_NAMED - 1]}…"
    return f"{short!r} (nearest: {', '.join(nearest)})" if nearest else repr(short)
