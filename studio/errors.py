"""What Studio raises where a person can do something about it."""

from collections.abc import Callable


class StudioError(ValueError):
    """A mistake the user can mend: the message is one sentence that says what to do."""


class Stopped(StudioError):
    """Work that was given up because whoever asked for it said so."""


def check_stopped(stopped: Callable[[], bool] | None) -> None:
    """Raises `Stopped` where `stopped`, a function that long work is given to be cancelled by, returns True."""
    if stopped is not None and stopped():
        raise Stopped("Stopped before the work was done.")
