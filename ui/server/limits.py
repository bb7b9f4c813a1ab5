"""What visitors of this process may ask for: limits that hold for every tab and every endpoint."""

from dataclasses import dataclass

from studio.errors import StudioError
from studio.images import MOST_PIXELS
from studio.ui.server.checks import check_text

MOST_PICTURES = 16
_LONGEST_NAME = 1000  # characters of a model's name or folder


@dataclass(frozen=True)
class Limits:
    """The most of everything.

    Args:
        images: of one request that samples.
        characters: of a prompt or a question.
        pixels: of an image that is given.
        answer: tokens of an answer, or `None` where that is left to whoever asks.
        models: the models that requests may use, what `studio.load` takes by name; or `None`: whatever that takes,
            folders too.
    """

    images: int = MOST_PICTURES
    characters: int = 2000
    pixels: int = MOST_PIXELS
    answer: int | None = None
    models: dict[str, str] | None = None


_limits = Limits()


def limits():
    """Those that hold now."""
    return _limits


def set_limits(new):
    """Let others hold from now on."""
    global _limits
    _limits = new


def check_words(what, text):
    """Refuse a prompt or a question that is none or too long; `what` names it, as in "The prompt"."""
    return check_text(what, text, _limits.characters)


def is_offered(name):
    """Whether requests may use a model of this name."""
    return _limits.models is None or name in _limits.models


def source_of(name):
    """What `studio.load` takes for a model of this name: a server may offer a folder without telling where it is."""
    return (_limits.models or {}).get(name, name)


def check_model(name):
    """Refuse a model that requests may not use, before anything looks for it; returns its name."""
    check_text("The name of a model", name, _LONGEST_NAME)
    if not is_offered(name.strip()):
        raise StudioError(f"This server offers {', '.join(_limits.models)}: choose one of these.")
    return name
