"""Converter of the released checkpoints of Distilled Decoding (arXiv:2412.17153): five class-conditional students.

Files are read with `weights_only`; sizes come from the shapes of the weights; an unknown or missing key is an error.
The averaged weights are taken where a file has them, as for all published numbers.
"""

import argparse
import re
from pathlib import Path

import torch

from studio.checkpoints.llamagen import _fill, _new_folder, _shape
from studio.errors import StudioError
from studio.models.distilled import DistilledStudent
from studio.models.llamagen import PRESETS, default_ffn_dim

_PLACES = (("ema",), ("model",), ("trainer", "ema_parameters"), ("trainer", "var_wo_ddp"))
_PUBLISHED_SPLITS = {12: 80, 24: 130}


def read_student_state_dict(path) -> dict[str, torch.Tensor]:
    """The weights of a released file, averaged ones first.

    Errors: `StudioError` for a missing file, for one that is no checkpoint, and for one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise StudioError(f"{path} is not a file: give the checkpoint's .pt file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StudioError(f"{path} is not a checkpoint of weights that can be read safely.") from error
    for place in _PLACES:
        found = content
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, dict) and found and all(isinstance(weight, torch.Tensor) for weight in found.values()):
            return found
    raise StudioError(f"{path} is no checkpoint of Distilled Decoding: it has no weights under ema, model or trainer.")


def student_from_state_dict(state: dict[str, torch.Tensor], **config) -> DistilledStudent:
    """A `DistilledStudent` with these weights. Sizes are inferred; `config` overrides them (`num_heads`, ...)."""
    inferred = _student_config(state) | config
    with torch.device("meta"):
        model = DistilledStudent(**inferred)
    return _fill(model, state, "student of LlamaGen")


def convert_distilled(path, out) -> Path:
    """Writes a released student as a folder for `from_pretrained`.

    Args:
        path: the authors' file.
        out: the folder to make.

    Errors: `StudioError` for a file that is no checkpoint or one of another architecture.
    """
    model = student_from_state_dict(read_student_state_dict(path))
    with _new_folder(out) as folder:
        model.save_pretrained(folder)
    return Path(out)


def _student_config(state: dict[str, torch.Tensor]) -> dict:
    what = "student of LlamaGen"
    dim, code_dim = _shape(state, "tok_embeddings.weight", what)
    hidden = _shape(state, "layers.0.feed_forward.w1.weight", what)[0]
    layers = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"layers\.\d+\.", name))
    heads = next((p["num_heads"] for p in PRESETS.values() if p["dim"] == dim), max(1, dim // 64))
    return {
        "vocab_size": _shape(state, "output.weight", what)[0],
        "code_dim": code_dim,
        "dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "ffn_dim": None if hidden == default_ffn_dim(dim) else hidden,
        "num_classes": _shape(state, "cls_embedding.embedding_table.weight", what)[0] - 1,
        "split": _PUBLISHED_SPLITS.get(layers) if dim in (768, 1024) else None,
    }
