"""What the values of a request may be: one check for each kind of value, for the page, for programs and for links."""

import math

from studio.errors import StudioError

_LARGEST_NUMBER = 1_000_000  # no setting means anything beyond, and floats of a device end somewhere


def check_text(what, value, most):
    """Refuse what is no text, is too long, or cannot be written as UTF-8.

    Args:
        what: names the value in messages, as in "The prompt".
        value: of a request.
        most: characters, at most.

    Returns:
        The value.
    """
    if not isinstance(value, str):
        raise StudioError(f"{what} must be text, not {shown(value)}.")
    if len(value) > most:
        raise StudioError(f"{what} has {len(value)} characters; at most {most} are read.")
    if not is_unicode(value):
        raise StudioError(f"{what} has half a character in it (a lone surrogate): cut text between characters.")
    return value


def check_number(what, value):
    """Refuse what is no finite number of a usable size; returns the value."""
    if not is_number(value) or not abs(value) <= _LARGEST_NUMBER:
        raise StudioError(f"{what} must be a finite number of at most {_LARGEST_NUMBER:,}, not {shown(value)}.")
    return value


def check_flag(what, value):
    """Refuse what is neither true nor false; returns the value."""
    if not isinstance(value, bool):
        raise StudioError(f"{what} must be true or false, not {shown(value)}.")
    return value


def check_options(decoding, options):
    """Refuse options of a decoding that are not of its kinds; the decoding itself checks their ranges.

    Args:
        decoding: an entry of `studio.DECODINGS`.
        options: by name.

    Returns:
        A new dict, whole numbers of whole options as `int`.
    """
    if not isinstance(options, dict):
        raise StudioError(f"Options are given by name, as in {{'delta': 0.1}}, not as {shown(options)}.")
    kinds = {option.name: option.kind for option in decoding.options}
    checked = {}
    for name, value in options.items():
        what, kind = f"The option {check_text('An option name', name, 100)}", kinds.get(name)
        if kind is str:
            value = check_text(what, value, 100)
        elif kind is int:
            if not is_whole(check_number(what, value)):
                raise StudioError(f"{what} must be a whole number, not {shown(value)}.")
            value = int(value)
        elif kind is float:
            value = float(check_number(what, value))
        checked[name] = value
    return checked


def is_unicode(text):
    """Whether a text can be written as UTF-8: halves of a character, which JavaScript's strings may end in, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value):
    """Whether something is a finite number (truth values are none)."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def is_whole(value):
    """Whether something is a finite number without a fraction."""
    return is_number(value) and value == int(value)


def shown(value):
    """A value as a message names it: short, and in characters that every encoding has."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of many digits"
    return text if len(text) <= 40 else f"{text[:40]}..."
