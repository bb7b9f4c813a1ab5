"""The saved state of a run: safetensors and JSON, checksummed, complete or not there.

A state is a folder `state-STEP`, written under another name, flushed and renamed. Its index holds a checksum of every
file and of itself, so a damaged state is passed over for the one before it. There are no pickles and no paths in it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from studio.checkpoints.bundled import sha256
from studio.errors import StudioError

FORMAT = 1
KEPT = 2
_NAME = re.compile(r"state-(\d+)")


def save_state(out: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], values: dict) -> None:
    """Write a state; remove all but the last `KEPT`, and later ones, which are damaged where a run passed them over.

    A whole state of the same step is left as it is.

    Args:
        out: the run's folder.
        step: optimiser steps done, which name the state.
        tensors: named groups of tensors, one file each.
        values: JSON values.

    Raises:
        StudioError: it cannot be written; earlier states stay.
    """
    partial, folder = out / "state.part", out / f"state-{step:09d}"
    if folder.exists() and _read(folder):
        return
    with writing("The state", out, partial):
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, partial / name)
            _flush(partial / name)
        index = {"format": FORMAT, "step": step, "values": values}
        index["files"] = {name: sha256(partial / name) for name in tensors}
        index["checksum"] = _checksum(index)
        (partial / "state.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        _flush(partial / "state.json")
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(out)
        states = _states(out)
        last = states.index(folder) + 1
        for other in states[: max(0, last - KEPT)] + states[last:]:
            shutil.rmtree(other)


@contextmanager
def writing(what: str, folder: Path, partial: Path) -> Iterator[None]:
    """What is written into a `partial` file or folder that does not exist yet, of which nothing is left on failure.

    Args:
        what: for the error.
        folder: where it comes to be, for the error.
        partial: removed before and after, if it still is there.

    Raises:
        StudioError: the disk is full, or cannot be written for another reason.
    """

    def clear():
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)

    try:
        clear()
        yield
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            clear()
        reason = getattr(error, "strerror", None) or error
        raise StudioError(
            f"{what} cannot be written to {folder} ({reason}): free some space and go on with --resume, which starts "
            "from the last saved state."
        ) from error


def load_state(out: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], dict] | None:
    """The newest whole state of a run: its step, tensors and values; None where there is none.

    Raises:
        StudioError: there are states, but all of them are damaged.
    """
    folders = _states(out)
    for folder in reversed(folders):
        if index := _read(folder):
            with suppress(SafetensorError):
                return index["step"], {name: load_file(folder / name) for name in index["files"]}, index["values"]
    if folders:
        raise StudioError(f"Every saved state in {out} is damaged: start anew with another --out.")
    return None


def has_state(out: Path) -> bool:
    """Whether a run has saved anything."""
    return bool(_states(out))


def _read(folder):
    """The index of a state; None where anything of it is damaged."""
    try:
        index = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        checksum = index.pop("checksum", None)  # states of the first training runs have none
        files = index["files"]
        is_whole = (
            checksum in (None, _checksum(index))
            and set(index) == {"format", "step", "values", "files"}
            and index["step"] == _step(folder)
            and all(Path(name).name == name and sha256(folder / name) == files[name] for name in files)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if is_whole and index["format"] != FORMAT:
        raise StudioError(f"{folder} was written by another version of Studio (format {index['format']}).")
    return index if is_whole else None


def _checksum(index):
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _step(folder):
    return int(_NAME.fullmatch(folder.name)[1])


def _states(out):
    """Folders of states, oldest first."""
    if not out.is_dir():
        return []
    return sorted((path for path in out.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
