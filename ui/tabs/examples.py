"""The example images of the package."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
EXAMPLE_FILES = sorted(_FOLDER.glob("scene-*.png"))


def example(name: str) -> str:
    """The path of an example image."""
    return str(_FOLDER / name)
