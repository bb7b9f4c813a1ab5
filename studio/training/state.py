"""The saved state of a run: safetensors and JSON, checksummed, complete or not there.

A state is a folder `state-STEP`, written under another name, flushed and renamed. Its index holds a checksum of every
file, so a damaged state is passed over for the one before it. There are no pickles and no paths in it.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from studio.checkpoints.bundled import sha256
from studio.errors import StudioError

FORMAT = 1
KEPT = 2
_NAME = re.compile(r"state-(\d+)")


def save_state(out: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], values: dict) -> None:
    """Write a state and remove all but the last `KEPT`.

    Args:
        out: the run's folder.
        step: optimiser steps done, which name the state.
        tensors: named groups of tensors, one file each.
        values: JSON values.

    Raises:
        StudioError: it cannot be written; earlier states stay.
    """
    partial, folder = out / "state.part", out / f"state-{step:09d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, partial / name)
            _flush(partial / name)
        index = {"format": FORMAT, "step": step, "values": values}
        index["files"] = {name: sha256(partial / name) for name in tensors}
        (partial / "state.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        _flush(partial / "state.json")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(out)
        for old in _states(out)[:-KEPT]:
            shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StudioError(
            f"The state cannot be written to {out} ({error.strerror or error}): free some space and go on with "
            "--resume; earlier states are kept."
        ) from error


def load_state(out: Path) -> tuple[int, dict[str, dict[str, torch.Tensor]], dict] | None:
    """The newest whole state of a run: its step, tensors and values; None where there is none.

    Raises:
        StudioError: there are states, but all of them are damaged.
    """
    folders = _states(out)
    for folder in reversed(folders):
        try:
            index = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise StudioError(f"{folder} was written by another version of Studio (format {index['format']}).")
            if any(sha256(folder / name) != expected for name, expected in index["files"].items()):
                continue
            return index["step"], {name: load_file(folder / name) for name in index["files"]}, index["values"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if folders:
        raise StudioError(f"Every saved state in {out} is damaged: start anew with another --out.")
    return None


def has_state(out: Path) -> bool:
    """Whether a run has saved anything."""
    return bool(_states(out))


def _states(out):
    """Folders of states, oldest first."""
    if not out.is_dir():
        return []
    return sorted((path for path in out.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: path.name)


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
