"""Images to try things with, which come with the package."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
EXAMPLE_FILES = sorted(_FOLDER.glob("scene-*.png"))


def example(name):
    """The path of one of them, as text."""
    return str(_FOLDER / name)
