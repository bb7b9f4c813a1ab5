"""Exceptions for mistakes that the user can correct, and for cancelled work."""

from collections.abc import Callable


class StudioError(ValueError):
    """A mistake that the user can correct: the message is one sentence that says what to do."""


class Stopped(StudioError):
    """Work that was cancelled by the caller."""


def check_stopped(stopped: Callable[[], bool] | None) -> None:
    """Raise `Stopped` if the callback `stopped` of long work returns True."""
    if stopped is not None and stopped():
        raise Stopped("Stopped before the work was done.")
