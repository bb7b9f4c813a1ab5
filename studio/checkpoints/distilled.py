"""Converters of the released checkpoints of Distilled Decoding (arXiv:2412.17153): five class-conditional students, of
LlamaGen and of VAR, and of what the latter need, VAR and its tokenizer (arXiv:2404.02905).

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
from studio.models.distilled_var import DistilledVAR
from studio.models.llamagen import PRESETS, default_ffn_dim
from studio.models.var import VAR
from studio.tokenizers.var import VARTokenizer

_PLACES = (("ema",), ("model",), ("trainer", "ema_parameters"), ("trainer", "var_wo_ddp"))
_PUBLISHED_SPLITS = {12: 80, 24: 130}
_PUBLISHED_VAR_SPLITS = {16: 5, 20: 4, 24: 4}
_COMPUTED = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV")


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
    return _filled(DistilledStudent, _student_config(state) | config, state, "student of LlamaGen")


def var_student_from_state_dict(state: dict[str, torch.Tensor], **config) -> DistilledVAR:
    """A `DistilledVAR` with these weights, sizes inferred except for `scales`; `config` overrides them."""
    state = _learned(state)
    inferred = _var_config(state, "student of VAR") | config
    if "split" not in config:
        inferred["split"] = _PUBLISHED_VAR_SPLITS.get(inferred["depth"])
    return _filled(DistilledVAR, inferred, state, "student of VAR")


def var_from_state_dict(state: dict[str, torch.Tensor], **config) -> VAR:
    """A `VAR` with these weights, sizes inferred except for `scales`; `config` overrides them."""
    state = _learned(state)
    return _filled(VAR, _var_config(state, "VAR transformer") | config, state, "VAR transformer")


def var_tokenizer_from_state_dict(state: dict[str, torch.Tensor], **config) -> VARTokenizer:
    """A `VARTokenizer` with these weights, sizes inferred except for `scales`; `config` overrides them."""
    state = _learned(state)
    return _filled(VARTokenizer, _var_tokenizer_config(state) | config, state, "VAR tokenizer")


def convert_distilled(path, out) -> Path:
    """Writes a released student as a folder for `from_pretrained`: of a `DistilledStudent` or a `DistilledVAR`.

    Args:
        path: the authors' file.
        out: the folder to make.

    Errors: `StudioError` for a file that is no checkpoint or one of another architecture.
    """
    state = read_student_state_dict(path)
    model = (var_student_from_state_dict if "word_embed.weight" in state else student_from_state_dict)(state)
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


def _filled(model_class, config: dict, state: dict[str, torch.Tensor], what: str):
    with torch.device("meta"):
        model = model_class(**config)
    return _fill(model, state, what)


def _learned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the buffers of masks and statistics that the authors store."""
    return {name: weight for name, weight in state.items() if not _COMPUTED.fullmatch(name)}


def _var_config(state: dict[str, torch.Tensor], what: str) -> dict:
    dim, code_dim = _shape(state, "word_embed.weight", what)
    return {
        "vocab_size": _shape(state, "head.weight", what)[0],
        "code_dim": code_dim,
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=0),
        "dim": dim,
        "num_heads": _shape(state, "blocks.0.attn.scale_mul_1H11", what)[1],
        "num_classes": _shape(state, "class_emb.weight", what)[0] - 1,
    }


def _var_tokenizer_config(state: dict[str, torch.Tensor]) -> dict:
    what = "VAR tokenizer"
    base = _shape(state, "encoder.conv_in.weight", what)[0]
    codes, code_dim = _shape(state, "quantize.embedding.weight", what)

    def count(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    levels = count(r"encoder\.down\.(\d+)\.")
    widths = [_shape(state, f"encoder.down.{n}.block.0.conv1.weight", what)[0] for n in range(levels)]
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "res_blocks": count(r"encoder\.down\.0\.block\.(\d+)\."),
        "code_dim": code_dim,
        "codebook_size": codes,
        "phis": count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    }
