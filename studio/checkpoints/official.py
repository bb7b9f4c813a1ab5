"""Shared parts of the converters: safe reading, renaming, building a model, and writing its folder.

Files are read with `weights_only`; an unknown or missing weight is an error, never skipped.
"""

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from studio.checkpoints.foreign import check_weights
from studio.errors import StudioError
from studio.files import new_folder, user_path
from studio.models.llama_blocks import default_ffn_dim
from studio.models.llamagen import PRESETS

State = dict[str, torch.Tensor]
ANY_PLACE = (("model",), ("module",), ("state_dict",), ())

_HF_LLAMA_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def read_weights(path: str | Path, places: tuple[tuple[str, ...], ...]) -> State:
    """The first state dict that a checkpoint file holds at one of `places`, paths of keys; `()` is the file itself.

    Raises:
        StudioError: a missing file, one that is no checkpoint, or one without weights.
    """
    path = user_path(path)
    if not os.path.isfile(path):
        raise StudioError(f"{path} is not a file: give the checkpoint's file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StudioError(f"{path} is not a checkpoint of weights that can be read safely.") from error
    for place in places:
        found: Any = content
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, dict) and found and all(isinstance(weight, torch.Tensor) for weight in found.values()):
            check_weights(found, path)
            return found
    named = ", ".join(".".join(place) for place in places if place)
    top = ", and none at its top either" if () in places else ""
    raise StudioError(f"{path} holds no state dict: it has no weights under {named}{top}.")


def shape_of(state: State, name: str, what: str) -> tuple[int, ...]:
    """The shape of a weight.

    Raises:
        StudioError: it is not there.
    """
    if name not in state:
        raise StudioError(f"This is not the checkpoint of a {what}: it has no {name}.")
    return tuple(state[name].shape)


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A name after these replacements in order, pairs of arguments of `re.sub`."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def count_of(state: State, pattern: str) -> int:
    """Count blocks, levels or layers: the distinct first groups of a pattern at the start of the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def llama_sizes(state: State, dim: int, what: str) -> dict:
    """dim, num_layers, num_heads and ffn_dim of a network of LlamaGen's blocks."""
    hidden = shape_of(state, "layers.0.feed_forward.w1.weight", what)[0]
    return {
        "dim": dim,
        "num_layers": count_of(state, r"layers\.(\d+)\."),
        "num_heads": next((p["num_heads"] for p in PRESETS.values() if p["dim"] == dim), max(1, dim // 64)),
        "ffn_dim": None if hidden == default_ffn_dim(dim) else hidden,
    }


def from_transformers_names(state: State, prefix: str = "") -> State:
    """Rename `{prefix}layers.N` from transformers' Llama names to LlamaGen's, and joins queries, keys and values.

    Raises:
        StudioError: a layer of which a part of these three is missing.
    """
    renamed = {}
    for name, weight in state.items():
        match = re.fullmatch(rf"{re.escape(prefix)}layers\.(\d+)\.(.+)\.weight", name)
        if match is None:
            renamed[name] = weight
            continue
        layer, part = match.groups()
        if part in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        if part == "self_attn.q_proj":
            names = [name.replace("q_proj", other) for other in ("k_proj", "v_proj")]
            if any(other not in state for other in names):
                raise StudioError(f"{name} has no k_proj and v_proj beside it: the checkpoint is not whole.")
            renamed[f"layers.{layer}.attention.wqkv.weight"] = torch.cat((weight, *(state[other] for other in names)))
        else:
            renamed[f"layers.{layer}.{_HF_LLAMA_NAMES.get(part, part)}.weight"] = weight
    return renamed


def build(model_class: type, config: dict, state: State, what: str) -> Any:
    """A model in evaluation mode, float32, with these weights, after a check of every name and shape.

    Raises:
        StudioError: names the first weights that are unknown, missing or misshapen.
    """
    with torch.device("meta"):
        model = model_class(**config)
    expected = model.state_dict()
    problems = {
        "unknown": sorted(set(state) - set(expected)),
        "missing": sorted(set(expected) - set(state)),
        "misshapen": sorted(n for n in set(state) & set(expected) if state[n].shape != expected[n].shape),
    }
    for kind, names in problems.items():
        if names:
            raise StudioError(
                f"This is not a {what} as its authors publish it: {len(names)} {kind} weights, {', '.join(names[:3])}."
            )
    model.load_state_dict({name: weight.float() for name, weight in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def save_new(model: ModelMixin | AutoencoderKL | DiffusionPipeline, out: str | Path) -> Path:
    """Write a model or pipeline with `save_pretrained` as a new folder.

    Raises:
        StudioError: as in `new_folder`.
    """
    with new_folder(out) as folder:
        model.save_pretrained(folder)
    return Path(out)
