"""Writing trained modules as bf16 safetensors without disturbing them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from studio.errors import StudioError


def save_bf16(model: Any, folder: Path) -> None:
    """`save_pretrained` of a bfloat16 copy of a diffusers or transformers model."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def remove_paths(folder: Path) -> None:
    """Takes the folders that parts were loaded from out of the configurations below a folder: they say nothing to
    anybody else.
    """
    for file in folder.rglob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_with_component(pipeline: Path, folder: Path, name: str, module: torch.nn.Module) -> None:
    """Writes a copy of a pipeline's folder in which the component of that name is a trained module, in bfloat16."""
    shutil.copytree(pipeline, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md", name))
    save_bf16(module, folder / name)
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index[name] = [type(module).__module__, type(module).__name__]
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_component(module: Any, folder: Path, name: str) -> None:
    """Start a module from the component of that name in a pipeline's folder; `StudioError` where there is none."""
    if not (folder / name).is_dir():
        raise StudioError(f"{folder} has no {name} to start from: start without --init-from.")
    weights = type(module).from_pretrained(folder / name, dtype=torch.float32)
    module.load_state_dict(weights.state_dict())
