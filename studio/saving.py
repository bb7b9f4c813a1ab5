"""Where pictures go, and how they get there: checked before the model runs, written whole or not at all."""

import json
import math
import os
import re
import stat
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from studio import __version__
from studio.errors import StudioError

METADATA_KEY = "studio"
_RECORDED = ("torch", "diffusers", "transformers")
_SHEET_CELL = 256
_SHEET_GAP = 8


def plan_paths(out, title, seeds, sheet=False):
    """Decide the file of each picture and check that it can be written.

    Args:
        out: a file if it ends in `.png` (several pictures: `name-0.png`, ...), else a folder.
        title: what the pictures show; names the files in a folder.
        seeds: one number per picture.
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


def check_writable(path):
    """Raise a `StudioError` unless a file can be made at `path`; leaves nothing behind."""
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise StudioError(f"{path} is a folder, not a file: choose another path.")
        folder = path.parent
        while not os.path.lexists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
        if len(os.fsencode(path.name)) > os.pathconf(folder, "PC_NAME_MAX") - len(".part"):
            raise StudioError(f"{path.name[:40]}... is too long for a file name: choose a shorter one.")
    except StudioError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudioError(f"{path} cannot be written ({reason}): choose another path.") from error


def save_all(writers):
    """Write several files, or none: each under a temporary name first, all renamed when the last one is whole.

    Args:
        writers: `{path: write}`, where `write(path)` writes one file.

    Raises:
        StudioError: a file cannot be written; nothing is left of any, nor of folders made for them.
    """
    made, parts = [], {}
    try:
        for path, write in writers.items():
            made += make_folders(path.parent)
            parts[path] = path.with_name(f"{path.name}.part")
            write(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    except BaseException as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise StudioError(f"The pictures cannot be written: {error.strerror or error}.") from error
        raise


def make_folders(folder):
    """Make a folder and its parents; return those that were made, outermost first."""
    missing = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for each in missing:
        each.mkdir(exist_ok=True)
    return missing


def png_writer(image, call, seed):
    """Return `write(path)` for a PNG that carries the call, the seed and the versions in a text chunk.

    Args:
        image: a PIL image.
        call: the settings, a dict of JSON values.
        seed: the number this picture was drawn with, or a list of them for a sheet.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps({"call": call, "seed": seed, "versions": versions()}, ensure_ascii=False))
    return lambda path: image.save(path, format="PNG", pnginfo=info)


def make_sheet(images):
    """Return one picture with all of them in a grid as square as it gets, small ones enlarged to be seen."""
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


def versions():
    """Return the versions a picture depends on, `{package: version}`."""
    return {"studio": __version__, **{name: installed for name in _RECORDED if (installed := package_version(name))}}


def package_version(name):
    """Return the version of an installed package, or `None`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def slug(title):
    """What a title becomes in a file name: at most 60 lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60].strip("-") or "picture"
