"""Checks of arguments: numbers, choices and text. Every setting goes through these.

A number that passes comes back as Python's own `int` or `float`, so that numpy's numbers, which callers have at hand,
work everywhere and are written to JSON; callers put it in place of what was given. `bool` is no number here.
"""

import json
import reprlib
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from studio.errors import StudioError

MAX_INTEGER = 2**63 - 1
MAX_NUMBER = 1e6
"""The largest scale or temperature: beyond it float32 arithmetic overflows somewhere in a network."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def check_integer(name: str, value: Any, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
    """Check an integer.

    Args:
        name: what the message calls it.
        value: an `int` or a numpy integer.
        minimum, maximum: the range, both included.

    Returns:
        The value as an `int`.

    Raises:
        StudioError: no integer, or one outside the range.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not minimum <= int(value) <= maximum:
        is_huge = isinstance(value, Integral) and int(value) > maximum
        limits = (
            f" of at least {minimum}" if maximum == MAX_INTEGER and not is_huge else f" from {minimum} to {maximum}"
        )
        limits = "" if (minimum, maximum) == (-MAX_INTEGER, MAX_INTEGER) else limits
        raise StudioError(f"{name} must be a whole number{limits}, not {shown(value)}.")
    return int(value)


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object, as an `object_pairs_hook`.

    Raises:
        StudioError: a name is there twice.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise StudioError(f"{shown(twice)} is given twice: leave one out.")
    return fields


def check_room(room: int, images: int) -> None:
    """Check that a running batch has room for some more images.

    Raises:
        StudioError: it has not.
    """
    if images > room:
        raise StudioError(f"The batch has room for {room} images, not {images}: wait until others are done.")


def check_number(name: str, value: Any, minimum: float = 0, maximum: float = MAX_NUMBER, above: bool = False) -> float:
    """Check a finite number.

    Args:
        name: what the message calls it.
        value: an `int`, a `float` or a numpy number.
        minimum, maximum: the range, both included.
        above: leaves `minimum` itself out.

    Returns:
        The value as an `int` or a `float`.

    Raises:
        StudioError: no number, not finite, or outside the range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or (above and value == minimum):
        lower = f"above {minimum:g} and" if above else f"of at least {minimum:g} and"
        raise StudioError(f"{name} must be a finite number {lower} at most {maximum:g}, not {shown(value)}.")
    return int(value) if isinstance(value, Integral) else float(value)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Check that a value is one of those allowed.

    Raises:
        StudioError: another value.
    """
    if not isinstance(value, str) or value not in allowed:
        raise StudioError(f"{name} is one of {', '.join(allowed)}, not {shown(value)}.")


def as_integer(value: Any) -> Any:
    """An integer that JSON or a form made a float of, such as 3.0, as an `int`; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_flag(name: str, value: object) -> bool:
    """Check a Python or numpy Boolean and return it as a `bool`.

    Raises:
        StudioError: anything else.
    """
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise StudioError(f"{name} must be True or False, not {shown(value)}.")
    return bool(value)


def check_text(name: str, value: Any, maximum: int, empty: str | None = None) -> str:
    """Check a text that a person gives.

    Args:
        name: what messages call it, as in "The prompt".
        value: a `str` that can be written as UTF-8.
        maximum: the most characters.
        empty: the sentence for a value that is no text or blank; `None` allows a blank text.

    Returns:
        The value.

    Raises:
        StudioError: not such a text.
    """
    if not isinstance(value, str) or (empty is not None and not value.strip()):
        raise StudioError(empty or f"{name} must be text, not {shown(value)}.")
    if len(value) > maximum:
        raise StudioError(f"{name} has {len(value)} characters; at most {maximum} are read.")
    if not is_unicode(value):
        raise StudioError(f"{name} is not valid Unicode (half of a character, or bytes that are not UTF-8): retype it.")
    return value


def check_options(options: Any, kinds: Mapping[str, type]) -> dict[str, int | float | str]:
    """Check the types of options given by name, as JSON has them; what takes them checks their ranges.

    Args:
        options: a dict by name.
        kinds: the type of each option by its name: `int`, `float` or `str`. Options of other names pass unchecked.

    Returns:
        A new dict with Python's own numbers.

    Raises:
        StudioError: no dict, a name that is no text, or a value of another type.
    """
    if not isinstance(options, dict):
        raise StudioError(f"Options are given by name, as in {{'delta': 0.1}}, not as {shown(options)}.")
    checked = {}
    for name, value in options.items():
        called, kind = f"The option {check_text('An option name', name, 100)}", kinds.get(name)
        if kind is str:
            value = check_text(called, value, 100)
        elif kind is int:
            value = check_integer(called, as_integer(value), -MAX_INTEGER)
        elif kind is float:
            value = float(check_number(called, value, -MAX_NUMBER))
        checked[name] = value
    return checked


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """A text that can be written as UTF-8: lone surrogates, as in some file names, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_text(value: object) -> str:
    """JSON that can be written as UTF-8: readable, or ASCII where a text in it has lone surrogates."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(value)


def first_line(error: BaseException) -> str:
    """The message of another library's error, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def set_fields(settings: object, **values: object) -> None:
    """Set fields of a frozen dataclass, from its `__post_init__`, to what its checks returned."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def shown(value: object) -> str:
    """A value as messages show it, shortened."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:
        return f"an integer of {int(value).bit_length()} bits"
    try:
        return printable(_repr.repr(value))
    except ValueError:
        return f"a {type(value).__name__}"
