"""Converter of the published folders of One-D-Piece (arXiv:2501.10064) to folders for `from_pretrained`.

Sizes come from the shapes of the weights. What a folder's config.json says of how they are used must be what this
library does.
"""

import json
import math
from pathlib import Path
from typing import Any

from studio.checkpoints.official import State, build, count_of, read_weights, save_new, shape_of
from studio.errors import StudioError
from studio.tokenizers.one_d_piece import PRESETS, OneDPieceTokenizer

_WHAT = "One-D-Piece tokenizer"
_FILES = ("model.safetensors", "pytorch_model.bin")
_USED_AS = {"use_l2_norm": True, "finetune_decoder": True}


def one_d_piece_from_state_dict(state: State, **config: Any) -> OneDPieceTokenizer:
    """An `OneDPieceTokenizer` with these weights. Sizes are inferred; `config` overrides them.

    What is not in the file: heads (those of the published size of that width, else of 64 numbers each),
    `legacy_reshape` and `norm_groups`.
    """
    return build(OneDPieceTokenizer, _config(state) | config, state, _WHAT)


def convert_one_d_piece(source: str | Path, out: str | Path) -> Path:
    """Write a published folder (config.json and weights), or its file of weights, as an `OneDPieceTokenizer` folder.

    Raises:
        StudioError: what is no checkpoint, one of another architecture, or one without its pixel decoder.
    """
    source = Path(source)
    if source.is_dir():
        _check_use(source / "config.json")
        source = next((source / name for name in _FILES if (source / name).is_file()), source / _FILES[0])
    return save_new(one_d_piece_from_state_dict(read_weights(source, ((),))), out)


def _check_use(file: Path) -> None:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["model"]["vq_model"]
        found = {name: settings.get(name, wanted) for name, wanted in _USED_AS.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudioError(f"{file} is not the configuration of a {_WHAT}: give the published folder.") from error
    for name, wanted in _USED_AS.items():
        if found[name] != wanted:
            raise StudioError(f"{file} has {name} = {found[name]!r}; what can be converted has {wanted!r}.")


def _config(state: State) -> dict:
    width, channels, patch, _ = shape_of(state, "encoder.patch_embed.weight", _WHAT)
    codes, code_dim = shape_of(state, "quantize.embedding.weight", _WHAT)
    pixel_codes, pixel_code_dim = shape_of(state, "pixel_quantize.embedding.weight", _WHAT)
    side = math.isqrt(shape_of(state, "encoder.positional_embedding", _WHAT)[0] - 1)
    levels = count_of(state, r"pixel_decoder\.up\.(\d+)\.")
    widths = [shape_of(state, f"pixel_decoder.up.{n}.block.0.conv1.weight", _WHAT)[0] for n in range(levels)]
    base = min(widths, default=1)
    decoder_width = shape_of(state, "decoder.decoder_embed.weight", _WHAT)[0]
    return {
        "in_channels": channels,
        "sample_size": side * patch,
        "patch_size": patch,
        "num_tokens": shape_of(state, "latent_tokens", _WHAT)[0],
        "code_dim": code_dim,
        "codebook_size": codes,
        "pixel_codes": pixel_codes,
        "pixel_code_dim": pixel_code_dim,
        "pixel_base_channels": base,
        "pixel_channel_multipliers": tuple(width // base for width in widths),
        "pixel_res_blocks": count_of(state, r"pixel_decoder\.mid\.(\d+)\."),
        **_transformer(state, "encoder", width),
        **_transformer(state, "decoder", decoder_width),
    }


def _transformer(state: State, part: str, width: int) -> dict:
    heads = next((preset["heads"] for preset in PRESETS.values() if preset["width"] == width), max(1, width // 64))
    layers = count_of(state, rf"{part}\.transformer\.(\d+)\.")
    return {f"{part}_width": width, f"{part}_layers": layers, f"{part}_heads": heads}
