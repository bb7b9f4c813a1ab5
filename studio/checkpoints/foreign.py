"""Model folders from unknown sources: which files are read, and how much of them.

Weights are safetensors, code is never run. What else a folder holds is text that libraries take at its word; here it is
looked at first: only regular files of a bounded size are opened, weights are numbers, and no regular expression keeps a
call busy without end. Chat templates are bounded in `studio.pipelines.chat_template`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from studio.checks import first_line
from studio.errors import StudioError

MAX_TEXT_BYTES = 64 << 20
"""Of one file of text: the largest vocabularies are half of that."""
MAX_PATTERN_CHARACTERS = 2000
MAX_SIZE, MAX_LAYERS = 1 << 24, 1000
_TEXT = {".json", ".txt", ".model", ".jinja"}
_READ = {*_TEXT, ".safetensors"}


def check_folder(folder: Path) -> None:
    """Check a model folder and the folders of its parts before a library opens a file of them.

    Raises:
        StudioError: something that would be read is no regular file, such as a named pipe, or is too long, or a
            tokenizer has a regular expression that may not end.
    """
    parts = [folder, *(part for part in sorted(folder.iterdir()) if part.is_dir())]
    for path in (path for part in parts for path in sorted(part.iterdir()) if path.suffix in _READ):
        if path.is_dir():
            continue
        if not path.is_file():
            raise StudioError(f"{path} is no regular file: copy the model again.")
        if path.suffix in _TEXT and path.stat().st_size > MAX_TEXT_BYTES:
            raise StudioError(f"{path} is longer than {MAX_TEXT_BYTES >> 20} MiB, which no model needs: copy it again.")
        if path.name == "tokenizer.json":
            _check_patterns(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        StudioError: the file is missing, too long, or holds no object.
    """
    if path.exists() and not path.is_file():
        raise StudioError(f"{path} is no regular file: copy the model again.")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT_BYTES + 1)
        content = json.loads(text)
    except FileNotFoundError as error:
        raise StudioError(f"{path.parent} is not a checkpoint: {path.name} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StudioError(f"{path} is not a configuration file: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise StudioError(f"{path} is not a configuration file.")
    return content


def check_sizes(config: Mapping, folder: Path) -> None:
    """Check the sizes in a configuration, by which a network is built before its weights are read.

    Raises:
        StudioError: a size that no model has.
    """
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        most = MAX_LAYERS if re.search("layers|depth|blocks", name) else MAX_SIZE
        if any(isinstance(number, int) and abs(number) > most for number in numbers):
            raise StudioError(f"The config.json of {folder} is damaged: its {name} is above {most}.")


def check_weights(weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Check that weights are finite.

    Raises:
        StudioError: a weight that is NaN or infinite.
    """
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise StudioError(f"The weights in {source} hold NaN or infinite numbers ({name}): copy or train it again.")


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a regular expression of a tokenizer whose backtracking may take exponential time.

    Groups may be optional but not repeated, and refer to nothing before: tokenizers need no more. What is left takes
    time that is a polynomial of the text, which the engine bounds.
    """
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern)
    if len(pattern) > MAX_PATTERN_CHARACTERS or re.search(r"\)[*+{]", plain) or re.search(r"\\[1-9]|\\[gk]", pattern):
        raise StudioError(f"{where} holds a regular expression that may not end: use another copy of the model.")


def _check_patterns(path):
    pending = [read_json(path)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                check_pattern(value["Regex"], str(path))
            pending += (item for name, item in value.items() if name != "vocab")
        elif isinstance(value, list):
            pending += (item for item in value if isinstance(item, dict))
