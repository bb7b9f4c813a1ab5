"""What visitors of this process may ask for: limits that hold for every tab and every endpoint."""

from dataclasses import dataclass

from studio.errors import StudioError
from studio.pictures import MOST_PIXELS

MOST_PICTURES = 16


@dataclass(frozen=True)
class Limits:
    """The most of everything.

    Args:
        pictures: of one request that draws.
        characters: of a prompt or a question.
        pixels: of a picture that is given.
        answer: tokens of an answer, or `None` where that is left to whoever asks.
        models: names of models that requests may use, or `None`: whatever `studio.load` takes, folders too.
    """

    pictures: int = MOST_PICTURES
    characters: int = 2000
    pixels: int = MOST_PIXELS
    answer: int | None = None
    models: tuple[str, ...] | None = None


_limits = Limits()


def limits():
    """Those that hold now."""
    return _limits


def set_limits(new):
    """Let others hold from now on."""
    global _limits
    _limits = new


def check_text(what, text):
    """Raises a `StudioError` for a text that is too long; `what` names it, as in "The prompt"."""
    if isinstance(text, str) and len(text) > _limits.characters:
        raise StudioError(f"{what} has {len(text)} characters; at most {_limits.characters} are read.")


def is_offered(name):
    """Whether requests may use a model of this name."""
    return _limits.models is None or name in _limits.models


def check_model(name):
    """Raises a `StudioError` for a model that requests may not use, before anything looks for it."""
    if not is_offered(name):
        raise StudioError(f"This server offers {', '.join(_limits.models)}: choose one of these.")
