"""Converters of the released checkpoints of Distilled Decoding (arXiv:2412.17153): five class-conditional students
of LlamaGen and VAR, and VAR itself with its tokenizer (arXiv:2404.02905).

Sizes come from the shapes of the weights. The averaged weights are taken where a file has them, as for all published
numbers.
"""

import re
from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.official import build, count_of, llama_sizes, read_weights, save_new, shape_of
from studio.models.distilled import DistilledStudent
from studio.models.distilled_var import DistilledVAR
from studio.models.var import VAR
from studio.tokenizers.var import VARTokenizer

_PLACES = (("ema",), ("model",), ("trainer", "ema_parameters"), ("trainer", "var_wo_ddp"))
_PUBLISHED_SPLITS = {12: 80, 24: 130}
_PUBLISHED_VAR_SPLITS = {16: 5, 20: 4, 24: 4}
_COMPUTED = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV")


def read_student_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a released file, averaged ones first.

    Raises:
        StudioError: a missing file, one that is no checkpoint, or one without weights.
    """
    return read_weights(path, _PLACES)


def student_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> DistilledStudent:
    """A `DistilledStudent` with these weights. Sizes are inferred; `config` overrides them (`num_heads`, ...)."""
    return build(DistilledStudent, _student_config(state) | config, state, "student of LlamaGen")


def var_student_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> DistilledVAR:
    """A `DistilledVAR` with these weights, sizes inferred except for `scales`; `config` overrides them."""
    state = _learned(state)
    inferred = _var_config(state, "student of VAR") | config
    if "split" not in config:
        inferred["split"] = _PUBLISHED_VAR_SPLITS.get(inferred["depth"])
    return build(DistilledVAR, inferred, state, "student of VAR")


def var_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> VAR:
    """A `VAR` with these weights, sizes inferred except for `scales`; `config` overrides them."""
    state = _learned(state)
    return build(VAR, _var_config(state, "VAR transformer") | config, state, "VAR transformer")


def var_tokenizer_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> VARTokenizer:
    """A `VARTokenizer` with these weights, sizes inferred except for `scales`; `config` overrides them."""
    state = _learned(state)
    return build(VARTokenizer, _var_tokenizer_config(state) | config, state, "VAR tokenizer")


def convert_distilled(path: str | Path, out: str | Path) -> Path:
    """Write a released student as a folder for `DistilledStudent` or `DistilledVAR.from_pretrained`.

    Args:
        path: the authors' file.
        out: the folder to make.

    Raises:
        StudioError: a file that is no checkpoint or one of another architecture.
    """
    state = read_student_state_dict(path)
    model = (var_student_from_state_dict if "word_embed.weight" in state else student_from_state_dict)(state)
    return save_new(model, out)


def _student_config(state: dict[str, torch.Tensor]) -> dict:
    what = "student of LlamaGen"
    dim, code_dim = shape_of(state, "tok_embeddings.weight", what)
    sizes = llama_sizes(state, dim, what)
    return {
        **sizes,
        "vocab_size": shape_of(state, "output.weight", what)[0],
        "code_dim": code_dim,
        "num_classes": shape_of(state, "cls_embedding.embedding_table.weight", what)[0] - 1,
        "split": _PUBLISHED_SPLITS.get(sizes["num_layers"]) if dim in (768, 1024) else None,
    }


def _learned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the buffers of masks and statistics that the authors store."""
    return {name: weight for name, weight in state.items() if not _COMPUTED.fullmatch(name)}


def _var_config(state: dict[str, torch.Tensor], what: str) -> dict:
    dim, code_dim = shape_of(state, "word_embed.weight", what)
    return {
        "vocab_size": shape_of(state, "head.weight", what)[0],
        "code_dim": code_dim,
        "depth": max(1, count_of(state, r"blocks\.(\d+)\.")),
        "dim": dim,
        "num_heads": shape_of(state, "blocks.0.attn.scale_mul_1H11", what)[1],
        "num_classes": shape_of(state, "class_emb.weight", what)[0] - 1,
    }


def _var_tokenizer_config(state: dict[str, torch.Tensor]) -> dict:
    what = "VAR tokenizer"
    base = shape_of(state, "encoder.conv_in.weight", what)[0]
    codes, code_dim = shape_of(state, "quantize.embedding.weight", what)

    levels = count_of(state, r"encoder\.down\.(\d+)\.")
    widths = [shape_of(state, f"encoder.down.{n}.block.0.conv1.weight", what)[0] for n in range(levels)]
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "res_blocks": count_of(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "code_dim": code_dim,
        "codebook_size": codes,
        "phis": count_of(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    }
