"""Writing trained modules as bf16 safetensors without disturbing them."""

import copy
import json
import shutil

import torch


def save_bf16(model, folder):
    """`save_pretrained` of a bfloat16 copy of a diffusers or transformers model."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def copy_with_component(pipeline, folder, name, module):
    """Writes a copy of a pipeline's folder in which the component of that name is a trained module, in bfloat16."""
    shutil.copytree(pipeline, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md", name))
    save_bf16(module, folder / name)
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index[name] = [type(module).__module__, type(module).__name__]
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
