"""Finding and reading recordings: a JSON and the arrays of the same name beside it."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("STUDIO_GOLDEN") or Path(__file__).parents[1] / "golden")


def find(form: str) -> list[Path]:
    """The JSON files of recordings whose name starts with `form`."""
    return sorted(FOLDER.glob(f"{form}*.json"))


def stem(path: Path) -> str:
    return path.stem


class Recording:
    """`config`, `notes` ... from the JSON as `info`; `state` (authors' keys) and `io`, floats as float32."""

    def __init__(self, path: Path):
        self.info = json.loads(path.read_text())
        arrays = load_file(path.with_suffix(".safetensors"))
        arrays = {name: a.float() if a.is_floating_point() else a for name, a in arrays.items()}
        self.state = {name[6:]: array for name, array in arrays.items() if name.startswith("state.")}
        self.io: dict[str, torch.Tensor] = {name[3:]: array for name, array in arrays.items() if name.startswith("io.")}
