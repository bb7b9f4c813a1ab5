"""Names of the classes of pipelines: ImageNet's, those of a folder, and the class that a name means."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.errors import StudioError
from studio.pipelines.class_labels import checked_labels, class_index

IMAGENET = Path(__file__).parent / "imagenet.txt"
"""The names of a class in each line, as WordNet has them, in the order of the challenge of 2012."""
_MOST_CLASSES = 100_000


def imagenet_labels(num_classes: int | None) -> dict[int, str] | None:
    """The labels of ImageNet's 1,000 classes, for a checkpoint of as many; None for any other."""
    if num_classes != 1000:
        return None
    return dict(enumerate(IMAGENET.read_text(encoding="utf-8").splitlines()))


def class_names_of(pipe: Any) -> dict[int, str] | None:
    """A name for each class of a loaded pipeline; None for a text-conditional one."""
    return None if pipe.takes_text else _named(pipe.transformer.config.num_classes, pipe.id2label)


def read_class_names(folder: Path) -> dict[int, str] | None:
    """A name for each class of a pipeline's folder, read without loading it.

    None for a text-conditional one, and where there is no such folder. Labels that `studio.load` would refuse are left
    out.
    """
    count = _read(folder / "transformer" / "config.json").get("num_classes")
    if not isinstance(count, int) or not 0 < count <= _MOST_CLASSES:
        return None
    try:
        return _named(count, checked_labels(_read(folder / "model_index.json").get("id2label"), count))
    except StudioError:
        return _named(count, {})


def class_number(label: Any, names: Mapping[int, str]) -> int:
    """The number of a class, given by number or by name, as pipelines find it.

    Raises:
        StudioError: no such class, or a name of several.
    """
    return class_index(label, names, len(names))


def _named(count: int, labels: Mapping[int, str]) -> dict[int, str]:
    return {number: labels.get(number, f"class {number}") for number in range(count)}


def _read(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
