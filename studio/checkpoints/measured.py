"""Speed and quality of decodings as measured on this machine, and the choice of the fastest one."""

import hashlib
import json
import math
import os
from pathlib import Path

import torch

from studio.checkpoints.bundled import BUNDLED, bundled_folder, sha256
from studio.errors import StudioError
from studio.files import cache_folder

LOSSLESS = ("ar", "jacobi", "mar", "speculative")


def fingerprint(model: str) -> str:
    """SHA-256 of all weights that a model (a bundled name or a folder) samples with, shared ones included."""
    if model in BUNDLED:
        own = bundled_folder(model)
        files = _weights(own)
        for name in BUNDLED[model].shares:
            files += [file for file in _weights(bundled_folder(name)) if _is_shared(file, bundled_folder(name), own)]
    else:
        files = _weights(Path(model))
    if not files:
        raise StudioError(f"{model} is no folder with weights here: give a bundled name or a model folder.")
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def _is_shared(file: Path, folder: Path, own: Path) -> bool:
    """Whether a pipeline in `own` samples with a file of another's folder: a model alone, or a part that it lacks."""
    part = file.relative_to(folder).parts[0]
    index = json.loads((own / "model_index.json").read_text(encoding="utf-8"))
    return file.parent == folder or (part in index and not _weights(own / part))


def save_measured(model: str, device: torch.device, rows: list[dict]) -> Path:
    """Store the rows of `studio bench decoding` for this machine; returns the file."""
    path = _path(model, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps({"model": model, "device": device.type, "rows": rows}, indent=1) + "\n")
    partial.replace(path)
    return path


def read_measured(model: str, device: torch.device) -> list[dict] | None:
    """The rows that `save_measured` stored for these weights on this type of device, or None."""
    path = _path(model, device)
    return json.loads(path.read_text())["rows"] if path.is_file() else None


def fastest(rows: list[dict], images: int, dtype: str, tolerance: float) -> dict:
    """The row with the fewest seconds per image whose loss of quality is within the tolerance.

    Args:
        rows: of one model on one device, as `studio bench decoding` prints them; the plain decoding comes first.
        images: how many are sampled at a time; rows of the nearest measured batch size count.
        dtype: rows of this precision count, "float32" or "bfloat16".
        tolerance: how much of the judge's top-1 accuracy may be lost, in accuracy (0.03: three points). Decodings
            that keep the distribution of images are always allowed; others that nobody judged never are.

    Raises:
        StudioError: a tolerance out of range, or nothing was measured in this precision.
    """
    if not 0 <= tolerance <= 1:
        raise StudioError(f"The tolerance is a share of the judge's top-1 accuracy from 0 to 1, not {tolerance:g}.")
    rows = [row for row in rows if row["dtype"] == dtype]
    if not rows:
        raise StudioError(f"No decoding was timed in {dtype} here: `studio bench decoding --save --dtype {dtype}`.")
    batch = min({row["batch"] for row in rows}, key=lambda size: abs(math.log(size / images)))
    rows = [row for row in rows if row["batch"] == batch]
    floor = (rows[0]["judge_top1"] or 0.0) - tolerance
    allowed = [
        row
        for row in rows
        if _keeps_the_distribution(row) or (row["judge_top1"] is not None and row["judge_top1"] >= floor)
    ]
    return min(allowed, key=lambda row: row["seconds_per_image"])


def _keeps_the_distribution(row):
    return row["decoding"] in LOSSLESS or row["settings"].get("mode") == "exact"


def _path(model, device):
    return cache_folder() / "decodings" / f"{fingerprint(model)[:16]}-{device.type}.json"
