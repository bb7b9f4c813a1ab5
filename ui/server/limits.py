"""What requests may ask of this process: limits that hold for every tab and every endpoint."""

from dataclasses import dataclass

from studio.checks import check_text
from studio.errors import StudioError
from studio.images import MOST_PIXELS

MAX_IMAGES = 16
_LONGEST_NAME = 1000  # characters of a model's name or folder


@dataclass(frozen=True)
class Limits:
    """The largest request.

    Args:
        images: sampled by one request, at most.
        characters: of a prompt or a question, at most.
        pixels: of an uploaded image, at most.
        answer: tokens of an answer, at most; `None` leaves that to the request.
        models: the models that requests may use: by name, what `studio.load` takes. `None`: whatever it takes, folders
            and repositories too.
    """

    images: int = MAX_IMAGES
    characters: int = 2000
    pixels: int = MOST_PIXELS
    answer: int | None = None
    models: dict[str, str] | None = None


_limits = Limits()


def limits() -> Limits:
    """The limits of this process."""
    return _limits


def set_limits(new: Limits) -> None:
    """Replace the limits of this process."""
    global _limits
    _limits = new


def check_user_text(name: str, text: object) -> str:
    """A prompt or a question of at most the characters allowed here; `name` is for messages, as in "The prompt"."""
    return check_text(name, text, _limits.characters)


def is_offered(name: str) -> bool:
    """Whether requests may use a model of this name."""
    return _limits.models is None or name in _limits.models


def source_of(name: str) -> str:
    """What `studio.load` takes for a model of this name: a server may offer a folder without naming its path."""
    return (_limits.models or {}).get(name, name)


def check_model(name: object) -> str:
    """The name of a model that requests may use; others are refused before anything looks for them."""
    name = check_text("The name of a model", name, _LONGEST_NAME)
    if _limits.models is not None and name.strip() not in _limits.models:
        raise StudioError(f"This server offers {', '.join(_limits.models)}: choose one of these.")
    return name
