"""The models that ship with the library: what they are, where they are, and whether their files are intact."""

import hashlib
import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from studio.checks import shown
from studio.errors import StudioError
from studio.files import user_path

ROOT = Path(__file__).parent / "bundled"
CHECKSUMS = ROOT / "checksums.json"
TRAINING_FILE = "training.json"
"""The file of a trained model's folder that says what it was trained on."""
DEFAULT_TOKENIZER = "emoji-1d"
"""The tokenizer that the command line and the app use by default."""


@dataclass(frozen=True)
class Bundled:
    """One bundled model.

    Args:
        kind: `"pipeline"`, `"tokenizer"` and `"reader"` (answers questions about images) are what `studio.load`
            returns; a `"judge"` is only used to measure.
        summary: one line for `studio models`.
        shares: bundled models whose parts it takes, so that these need not be stored twice.
    """

    kind: str
    summary: str
    shares: tuple[str, ...] = ()


BUNDLED = {
    "emoji-ar": Bundled(
        "pipeline", "text to image at 128 px: a LlamaGen transformer over the tokens of emoji-vq", shares=("emoji-vq",)
    ),
    "emoji-1d-ar": Bundled(
        "pipeline",
        "text to image, coarse to fine: a LlamaGen over the rows of emoji-1d",
        shares=("emoji-ar", "emoji-1d"),
    ),
    "emoji-bridge": Bundled(
        "pipeline",
        "text to image at 128 px: a TokenBridge over the levels of emoji-kl",
        shares=("emoji-ar", "emoji-kl"),
    ),
    "emoji-mar": Bundled(
        "pipeline", "text to image at 128 px: a MAR over the latents of emoji-kl", shares=("emoji-ar", "emoji-kl")
    ),
    "emoji-resgen": Bundled(
        "pipeline", "text to image: a ResGen over the codes of emoji-rvq", shares=("emoji-ar", "emoji-rvq")
    ),
    "emoji-vq": Bundled("tokenizer", "image to tokens and back at 128 px: a VQ tokenizer"),
    "emoji-1d": Bundled("tokenizer", "image to a row of tokens and back, from any first few: a One-D-Piece"),
    "emoji-rvq": Bundled("tokenizer", "image to tokens and back, coarse to fine: an RQ-VAE of four levels"),
    "emoji-kl": Bundled("tokenizer", "image to continuous tokens and back at 128 px: a KL autoencoder"),
    "emoji-vlm": Bundled("reader", "image and question to answer: a LLaVA-NeXT that reads scenes of emoji and words"),
    "emoji-judge": Bundled("judge", "names concept, style and background of an image; used by `studio evaluate`"),
}


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled model after checking every file of it.

    Raises:
        StudioError: no such model, a file is missing, or a file differs from the one that was released.
    """
    if name not in BUNDLED:
        raise StudioError(unknown_name(name))
    checksums = read_checksums().get(name)
    if not checksums:
        raise StudioError(
            f"The weights of {name} are not in this copy of Studio: train them with `studio train --preset {name}`."
        )
    for file, expected in checksums.items():
        path = ROOT / name / file
        if not path.is_file():
            raise StudioError(f"{name} is incomplete ({path} is missing): install Studio again.")
        if sha256(path) != expected:
            raise StudioError(f"{name} is damaged or was changed ({path} has another checksum): install Studio again.")
    return ROOT / name


def folder_of_model(folder: str | Path) -> Path:
    """The folder of a model: for the folder of a training run, that of the model in it."""
    folder = user_path(folder)
    is_run = os.path.isfile(folder / "options.json") and os.path.isdir(folder / "model")  # a name of any length
    return folder / "model" if is_run else folder


def bundled_name_of(folder: str | Path) -> str | None:
    """Return the name of the bundled model whose own folder this is, or `None`."""
    folder = Path(folder).resolve()
    return folder.name if folder.parent == ROOT.resolve() and folder.name in BUNDLED else None


def owner_of_words(folder: Path) -> Path:
    """The folder that has the text encoder, tokenizer and vocabulary of a pipeline: its own, or that of a bundled model
    which a bundled pipeline shares parts of.
    """
    name = bundled_name_of(folder)
    shares = () if name is None or (folder / "text_encoder").is_dir() else BUNDLED[name].shares
    return next((ROOT / other for other in shares if (ROOT / other / "text_encoder").is_dir()), folder)


def unknown_name(name: str) -> str:
    """The message that there is no model of this name, with the nearest bundled name."""
    nearest = get_close_matches(name[:40], BUNDLED, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"There is no model or folder called {shown(name)}{hint}; bundled are {', '.join(BUNDLED)}."


def read_checksums() -> dict[str, dict[str, str]]:
    """Return `{model: {file: sha256}}` of the release, empty before the first one."""
    try:
        return json.loads(CHECKSUMS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StudioError(f"{CHECKSUMS} is damaged: install Studio again.") from error


def bundled_names(kind: str) -> list[str]:
    """Names of the bundled models of a kind, such as "pipeline", whose weights are in this copy."""
    there = read_checksums()
    return [name for name, about in BUNDLED.items() if about.kind == kind and there.get(name)]


def write_checksums() -> None:
    """Write the checksums of the bundled files of this checkout; part of a release (`make checksums`)."""
    checksums = {name: files for name in sorted(BUNDLED) if (files := _files(ROOT / name))}
    text = json.dumps(checksums, indent=1, sort_keys=True) + "\n"
    CHECKSUMS.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder):
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
