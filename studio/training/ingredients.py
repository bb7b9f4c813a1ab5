"""Models that a recipe starts from and that another recipe makes."""

from pathlib import Path

from studio.checkpoints.bundled import BUNDLED, bundled_folder, read_checksums
from studio.errors import StudioError


def ingredient(name: str) -> Path:
    """The folder of a model: the bundled one, or what `studio train NAME` left in `runs/`, or a folder of that name.

    Errors: `StudioError` where there is none of these.
    """
    if name in BUNDLED and read_checksums().get(name):
        return bundled_folder(name)
    for folder in (Path("runs") / name / "model", Path(name)):
        if folder.is_dir():
            return folder
    raise StudioError(f"This recipe needs {name}, which is not here: run `studio train {name}` first.")
