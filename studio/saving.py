"""Writing of images: paths are checked before the model runs, files are written completely or not at all."""

import filecmp
import json
import math
import os
import re
import secrets
import stat
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING

from studio import __version__
from studio.errors import StudioError

if TYPE_CHECKING:
    from PIL import Image


METADATA_KEY = "studio"
_RECORDED = ("torch", "diffusers", "transformers")
_SHEET_CELL = 256
_SHEET_GAP = 8
_SLUG_LENGTH, _SLUG_BYTES = 60, 120


def plan_paths(out: Path, title: str, seeds: Sequence[int], sheet: bool = False) -> tuple[list[Path], Path | None]:
    """Decide the file of each image and check that it can be written.

    Args:
        out: a file if it ends in `.png` (several images: `name-0.png`, ...), else a folder.
        title: what the images show; names the files in a folder.
        seeds: one number per image.
        sheet: whether there is one more file for the sheet.

    Returns:
        The paths, one per seed, and the path of the sheet or `None`.

    Raises:
        StudioError: a path cannot be written.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() == ".png":
        stem = out.with_suffix("")
        paths = [out] if len(seeds) == 1 else [Path(f"{stem}-{index}.png") for index in range(len(seeds))]
        sheet_path = Path(f"{stem}-sheet.png")
    else:
        name = slug(title)
        paths = [out / f"{name}-{seed}.png" for seed in seeds]
        sheet_path = out / f"{name}-{seeds[0]}-sheet.png"
    for path in [*paths, sheet_path]:
        check_writable(path)
    return paths, sheet_path if sheet else None


def check_writable(path: Path) -> None:
    """Check that a file can be made at `path`, or where a link there leads, without leaving one.

    Raises:
        StudioError: it cannot be written.
    """
    path = _target(path)
    try:
        with suppress(FileNotFoundError):
            kind = os.stat(path).st_mode
            if not stat.S_ISREG(kind):
                what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
                raise StudioError(f"{path} is {what}, not a file: choose another path.")
        folder = path.parent
        while not os.path.lexists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
        if len(os.fsencode(path.name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise StudioError(f"{path.name[:40]}... is too long for a file name: choose a shorter one.")
    except StudioError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudioError(f"{path} cannot be written ({reason}): choose another path.") from error


def save_all(writers: dict[Path, Callable[[Path], object]]) -> list[Path]:
    """Write several files, or none: each under a temporary name first, all renamed when the last one is complete.

    A link is followed: the file that it leads to is written.

    Args:
        writers: `{path: write}`, where `write(path)` writes one file.

    Returns:
        The paths at which something else was before.

    Raises:
        StudioError: a file cannot be written; nothing is left of any, nor of folders made for them.
    """
    made, parts, replaced = [], {}, []
    try:
        for path, write in writers.items():
            target = _target(path)
            made += make_folders(target.parent)
            parts[target] = target.with_name(f".studio-{secrets.token_hex(8)}.part")
            write(parts[target])
            if target.exists() and not filecmp.cmp(parts[target], target, shallow=False):
                replaced.append(path)
        for target, part in parts.items():
            os.replace(part, target)
    except BaseException as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise StudioError(f"The images cannot be written: {error.strerror or error}.") from error
        raise
    return replaced


def save_new(writers: dict[Path, Callable[[Path], object]], records: dict[Path, tuple[dict, int]]) -> list[Path]:
    """Write several PNGs, or none, and replace nothing: where a name is taken, `name-2.png`, `name-3.png`, ... follow.

    A name is claimed by creating its file, so two processes that write to one folder never take the same one.

    Args:
        writers: as of `save_all`.
        records: `{path: (call, seed)}`, as of `png_writer`; a file that carries the same ones is written again.

    Returns:
        The paths in the order of `writers`.

    Raises:
        StudioError: a file cannot be written; nothing is left of any, nor of folders made for them.
    """
    made, claimed, chosen = [], [], {}
    try:
        for path, write in writers.items():
            made += make_folders(path.parent)
            candidate, is_new = _claim(path, *records[path])
            claimed += [candidate] * is_new
            chosen[candidate] = write
        save_all(chosen)
    except BaseException as error:
        for candidate in claimed:
            candidate.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise StudioError(f"The images cannot be written: {error.strerror or error}.") from error
        raise
    return list(chosen)


def _claim(path: Path, call: dict, seed: int) -> tuple[Path, bool]:
    """The first name that is free or carries this call and seed, and whether it was free and is claimed now."""
    number = 0
    while True:
        number += 1
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return candidate, True
        except FileExistsError:
            if holds(candidate, call, seed):
                return candidate, False


def holds(path: Path, call: dict, seed: int) -> bool:
    """Whether the file at `path` is a PNG whose metadata has this call and this seed."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[METADATA_KEY])
        return (record["call"], record["seed"]) == tuple(json.loads(json.dumps([call, seed])))
    except (OSError, LookupError, TypeError, ValueError, SyntaxError, RecursionError):
        return False


def _target(path):
    """The file that a path leads to, with links resolved."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that were made, outermost first."""
    missing: list[Path] = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for each in missing:
        each.mkdir(exist_ok=True)
    return missing


def png_writer(image: "Image.Image", call: dict, seed: int | None) -> Callable[[Path | IO[bytes]], None]:
    """Return `write(path)` for a PNG with the call, the seed and the versions in a text chunk.

    Args:
        image: a PIL image.
        call: the settings, a dict of JSON values.
        seed: the number this image was sampled with, or a list of them for a sheet.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps({"call": call, "seed": seed, "versions": versions()}, ensure_ascii=False))
    return lambda path: image.save(path, format="PNG", pnginfo=info)


def make_sheet(images: Sequence["Image.Image"]) -> "Image.Image":
    """Return one image with all of them in a grid as square as possible, small ones enlarged."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    scale = max(1, _SHEET_CELL // max(max(image.size) for image in images))
    width, height = (max(image.size[axis] for image in images) * scale for axis in (0, 1))
    sheet = Image.new(
        "RGB", (columns * (width + _SHEET_GAP) + _SHEET_GAP, rows * (height + _SHEET_GAP) + _SHEET_GAP), "white"
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        cell = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        sheet.paste(cell, (_SHEET_GAP + column * (width + _SHEET_GAP), _SHEET_GAP + row * (height + _SHEET_GAP)))
    return sheet


def versions() -> dict[str, str]:
    """Return the versions that an image depends on, `{package: version}`."""
    return {"studio": __version__, **{name: installed for name in _RECORDED if (installed := package_version(name))}}


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or `None`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def slug(title: str) -> str:
    """A title as part of a file name: letters and digits of any script in lower case, and hyphens.

    At most 60 characters, and 120 bytes; a checksum where a title has neither letters nor digits.
    """
    letters = (char if unicodedata.category(char)[0] in "LMN" else "-" for char in title.lower())
    name = re.sub("-+", "-", unicodedata.normalize("NFC", "".join(letters))).strip("-")[:_SLUG_LENGTH]
    while len(name.encode()) > _SLUG_BYTES:
        name = name[:-1]
    return name.strip("-") or f"image-{zlib.crc32(title.encode('utf-8', 'surrogatepass')):08x}"
