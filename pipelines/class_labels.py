"""Names of classes: `id2label` of a class-conditional pipeline, and the class that a name means.

As in diffusers' DiT pipeline, a label holds the names of a class with commas between them: "tench, Tinca tinca".
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from studio.checks import check_integer, shown
from studio.errors import StudioError
from studio.pipelines.known_words import nearest_labels

ClassLabels = int | str | list[int] | list[str] | list[int | str] | None
"""Classes by number or by name: one, or a list of them."""
_Names = dict[str, list[int]]
_LONGEST = 500  # characters of a label


def checked_labels(id2label: Any, num_classes: int | None) -> dict[int, str]:
    """The labels of a configuration, whose keys JSON turns into text; empty where it has none.

    Args:
        id2label: a dict of labels by class, or None.
        num_classes: of the transformer; None where it is text-conditional.

    Raises:
        StudioError: no such dict, or labels of classes that are not there.
    """
    if id2label is None:
        return {}
    if num_classes is None:
        raise StudioError("This model is text-conditional and has no classes: leave out id2label.")
    try:
        labels = {int(number): label for number, label in id2label.items()}
        good = all(isinstance(label, str) and 0 < len(label) <= _LONGEST for label in labels.values())
        if not good or not all(0 <= number < num_classes for number in labels):
            raise ValueError("not the labels of these classes")
    except (AttributeError, TypeError, ValueError) as error:
        raise StudioError(
            f"id2label names classes by their numbers, 0 to {num_classes - 1}, as in {{0: 'tench, Tinca tinca'}}, not "
            f"{shown(id2label)}."
        ) from error
    return dict(sorted(labels.items()))


def class_index(label: Any, id2label: Mapping[int, str], num_classes: int) -> int:
    """The number of a class, given by number or by name.

    A name is a whole label or one of the names in it. One that is written alike comes before one in other case, and a
    whole label before a part of one. Text of digits is a number, unless a class is called so.

    Args:
        label: a number, or text.
        id2label: labels by class, as `checked_labels` returns them.
        num_classes: how many classes there are.

    Raises:
        StudioError: no such class, or a name of several.
    """
    if not isinstance(label, str):
        return check_integer("Each of class_labels", label, 0, num_classes - 1)
    name = " ".join(label.split())
    written, folded = _names_of(tuple(id2label.items()))
    for names, wanted in [(names, name) for names in written] + [(names, name.casefold()) for names in folded]:
        numbers = names.get(wanted, ())
        if len(numbers) > 1:
            which = " or ".join(f"{number} ({id2label[number]})" for number in numbers)
            raise StudioError(f"{shown(label)} names {len(numbers)} classes: give the number {which}.")
        if numbers:
            return numbers[0]
    if name.lstrip("-").isdecimal() and len(name) < 20:
        return check_integer("Each of class_labels", int(name), 0, num_classes - 1)
    numbered = f"give a number from 0 to {num_classes - 1}"
    if not id2label:
        raise StudioError(f"The classes of this model have no names: {numbered}, not {shown(label)}.")
    close = nearest_labels(name.casefold(), [part for text in id2label.values() for part in _parts(text)])
    hint = f"did you mean {' or '.join(close)}? Otherwise {numbered}" if close else numbered
    raise StudioError(f"There is no class {shown(label)}: {hint}.")


@lru_cache(maxsize=8)
def _names_of(labels: tuple[tuple[int, str], ...]) -> tuple[list[_Names], list[_Names]]:
    """Classes by name, by whole label and by a part of one: as they are written, and in folded case."""
    whole: _Names = {}
    parts: _Names = {}
    for number, label in labels:
        whole.setdefault(" ".join(label.split()), []).append(number)
        for part in dict.fromkeys(_parts(label)):
            parts.setdefault(part, []).append(number)
    return [whole, parts], [_folded(whole), _folded(parts)]


def _parts(label: str) -> list[str]:
    return [" ".join(part.split()) for part in label.split(",") if part.strip()]


def _folded(names: _Names) -> _Names:
    folded: _Names = {}
    for name, numbers in names.items():
        known = folded.setdefault(name.casefold(), [])
        known += [number for number in numbers if number not in known]
    return folded
