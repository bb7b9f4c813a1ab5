"""Converter of LANTERN's published drafters (arXiv:2410.03355) to folders for `Drafter.from_pretrained`.

Sizes come from the shapes of the weights; an unknown or missing key is an error. The head stays with the target.
"""

import re
from pathlib import Path

import torch

from studio.checkpoints.llamagen import _fill, _new_folder, _shape, read_state_dict
from studio.errors import StudioError
from studio.models.drafter import Drafter
from studio.models.llamagen import PRESETS, default_ffn_dim

_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_IGNORED = {"lm_head.weight"}


def drafter_from_state_dict(state: dict[str, torch.Tensor], **config) -> Drafter:
    """A `Drafter` with the authors' weights. Sizes are inferred; `config` overrides them (`num_heads`, ...)."""
    state = _our_names(state)
    what = "drafter of LANTERN"
    vocab, dim = _shape(state, "embed_tokens.weight", what)
    hidden = _shape(state, "layers.0.feed_forward.w1.weight", what)[0]
    inferred = {
        "vocab_size": vocab,
        "dim": dim,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in state if re.match(r"layers\.\d+\.", name)),
        "num_heads": next((p["num_heads"] for p in PRESETS.values() if p["dim"] == dim), max(1, dim // 64)),
        "ffn_dim": None if hidden == default_ffn_dim(dim) else hidden,
    }
    if "fc.bias" not in state and "fc.weight" in state:
        state["fc.bias"] = torch.zeros(dim)
    with torch.device("meta"):
        model = Drafter(**(inferred | config))
    return _fill(model, state, what)


def convert_drafter(path, out, *, grid_size: int = 16, prefix_length: int = 120) -> Path:
    """Writes a published drafter as a folder.

    Args:
        path: the authors' file, .bin, .pt or .safetensors.
        out: the folder to make.
        grid_size: tokens a side of the target: 16 in stage 1, 32 in stage 2; the file does not tell.
        prefix_length: prefix positions of the target: 120 for text, 1 for classes.

    Errors: `StudioError` for a file that is no checkpoint or one of another architecture.
    """
    model = drafter_from_state_dict(read_state_dict(path), grid_size=grid_size, prefix_length=prefix_length)
    with _new_folder(out) as folder:
        model.save_pretrained(folder)
    return Path(out)


def _our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the authors' layers to ours, and joins queries, keys and values."""
    renamed = {}
    for name, weight in state.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if name in _IGNORED:
            continue
        if match is None:
            renamed[name] = weight
            continue
        layer, part = match.groups()
        if part in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        if part == "self_attn.q_proj":
            others = [state.get(name.replace("q_proj", other)) for other in ("k_proj", "v_proj")]
            if any(other is None for other in others):
                raise StudioError(f"{name} has no k_proj and v_proj beside it: the checkpoint is not whole.")
            renamed[f"layers.{layer}.attention.wqkv.weight"] = torch.cat((weight, *others))
        else:
            renamed[f"layers.{layer}.{_NAMES.get(part, part)}.weight"] = weight
    return renamed
