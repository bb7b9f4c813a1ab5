"""Converters of the checkpoints of RQ-VAE and RQ-Transformer (arXiv:2203.01941): tokenizer, network, or a pipeline.

Sizes come from the shapes of the weights. The averaged weights are taken where a file has them.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.class_names import imagenet_labels
from studio.checkpoints.loading import load_model
from studio.checkpoints.official import State, build, count_of, read_weights, save_new, shape_of
from studio.errors import StudioError
from studio.models.rq_transformer import RQTransformer
from studio.pipelines.rq_transformer import RQTransformerPipeline, incompatibility
from studio.tokenizers.rvq import RVQTokenizer

_PLACES = (("state_dict_ema",), ("state_dict",))
_TOKENIZER, _TRANSFORMER = "tokenizer of RQ-VAE", "transformer of the RQ-Transformer kind"
_AVERAGES = (".cluster_size_ema", ".embed_ema")
_PUBLISHED_SAMPLING: dict[int, dict[str, Any]] = {42: {"default_top_p": 0.92}}
"""By the layers of the spatial transformer: the size 1.4B, of ImageNet."""


def rvq_from_state_dict(state: State, **config: Any) -> RVQTokenizer:
    """An `RVQTokenizer` with these weights. Sizes are inferred; `config` overrides them.

    What is not in the file: `sample_size`, `norm_groups`, and `cell`, a square when left out.
    """
    state, codebooks = residual_codebooks(state, "quantizer.")
    return build(RVQTokenizer, _rvq_config(state) | codebooks | config, state, _TOKENIZER)


def rq_transformer_from_state_dict(state: State, **config: Any) -> RQTransformer:
    """An `RQTransformer` with these weights. Sizes are inferred; `config` overrides them.

    What is not in the file: heads (of 64 numbers each when left out), `grid` (a square), `vocab_size` of levels of
    different size, `depth_reads_sums` and `activation`.
    """
    state = {name: weight for name, weight in state.items() if name != "tok_emb.offsets"}
    return build(RQTransformer, _transformer_config(state) | config, state, _TRANSFORMER)


def residual_codebooks(state: State, prefix: str) -> tuple[State, dict]:
    """The weights with the codebooks under `prefix` as we keep them, and what an `RVQTokenizer` calls their sizes.

    Each codebook loses its padding row and the averages of its training; of equal ones a single one is left.

    Raises:
        StudioError: a codebook that is missing or whose last row is no padding.
    """
    depth = max(1, count_of(state, rf"{re.escape(prefix)}codebooks\.(\d+)\."))
    tables = {name: _unpadded(state, name) for name in (f"{prefix}codebooks.{n}.weight" for n in range(depth))}
    first, *others = tables.values()
    shared = all(_equal(first, other) for other in others)
    sizes = tuple(len(table) for table in tables.values())
    rest = {name: weight for name, weight in state.items() if name not in tables and not name.endswith(_AVERAGES)}
    kept = dict([*tables.items()][:1] if shared else tables)
    one_size = len(set(sizes)) == 1
    return rest | kept, {
        "depth": depth,
        "codebook_size": sizes[0] if one_size else sizes,
        "shared_codebook": shared,
    }


def convert_rq_vae(path: str | Path, out: str | Path) -> Path:
    """Write the authors' RQ-VAE file as an `RVQTokenizer` folder.

    Raises:
        StudioError: a file that is no checkpoint or one of another architecture.
    """
    return save_new(rvq_from_state_dict(read_weights(path, _PLACES)), out)


def convert_rq_transformer(path: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> Path:
    """Write the authors' RQ-Transformer file as a pipeline folder for `studio.load`, or alone.

    Args:
        path: the authors' file of the network.
        out: the folder to make.
        tokenizer: the authors' file of its RQ-VAE, or the folder that `convert_rq_vae` made of it. When None, the
            folder is for `RQTransformer.from_pretrained`: of texts there is no pipeline, since the network has words of
            its own.

    Raises:
        StudioError: as in `convert_rq_vae`, or a network of texts with a tokenizer, or parts
            that do not fit.
    """
    transformer = rq_transformer_from_state_dict(read_weights(path, _PLACES))
    if tokenizer is None:
        return save_new(transformer, out)
    if transformer.config.caption_words is not None:
        raise StudioError(f"{path} reads texts in words of its own, for which there is no pipeline: give no tokenizer.")
    image_tokenizer = _read_tokenizer(tokenizer, rows=transformer.config.grid[0])
    if mismatch := incompatibility(image_tokenizer, transformer.config):
        raise StudioError(f"{path} and {tokenizer} do not belong together: {mismatch}.")
    sampling = _PUBLISHED_SAMPLING.get(transformer.config.spatial_layers, {})
    labels = imagenet_labels(transformer.config.num_classes)
    return save_new(RQTransformerPipeline(image_tokenizer, transformer, id2label=labels, **sampling), out)


def _read_tokenizer(source, rows: int) -> RVQTokenizer:
    """A folder's, or a file's for images of so many rows of cells, which the file does not tell."""
    if Path(source).is_dir():
        return load_model(RVQTokenizer, Path(source), torch.float32)
    tokenizer = rvq_from_state_dict(read_weights(source, _PLACES))
    tokenizer.register_to_config(sample_size=rows * tokenizer.pixels_per_cell[0])
    return tokenizer


def _unpadded(state: State, name: str) -> torch.Tensor:
    shape_of(state, name, _TOKENIZER)
    table, padding = state[name][:-1], state[name][-1]
    if not padding.is_meta and padding.any():
        raise StudioError(f"This is not an RQ-VAE as its authors publish it: the last row of {name} is no padding.")
    return table


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two codebooks are one; without their numbers, whether they could be."""
    return one.shape == other.shape and (one.is_meta or torch.equal(one, other))


def _rvq_config(state: State) -> dict:
    what = _TOKENIZER
    base, channels = shape_of(state, "encoder.conv_in.weight", what)[:2]
    levels = count_of(state, r"encoder\.down\.(\d+)\.")
    widths = [shape_of(state, f"encoder.down.{n}.block.0.conv1.weight", what)[0] for n in range(levels)]
    feature_dim, z_channels = shape_of(state, "quant_conv.weight", what)[:2]
    side = math.isqrt(shape_of(state, "quantizer.codebooks.0.weight", what)[1] // feature_dim)
    return {
        "in_channels": channels,
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "res_blocks": count_of(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_levels": tuple(n for n in range(levels) if f"encoder.down.{n}.attn.0.q.weight" in state),
        "z_channels": z_channels,
        "feature_dim": feature_dim,
        "cell": (side, side),
    }


def _transformer_config(state: State) -> dict:
    what = _TRANSFORMER
    _, cells, dim = shape_of(state, "pos_emb_hw", what)
    depth, side = shape_of(state, "pos_emb_d", what)[1], math.isqrt(cells)
    codes = next((state[name].shape[1] for name in ("input_mlp.weight", "head_mlp.weight") if name in state), 1)
    classifier = shape_of(state, "classifier.linear.weight", what)
    embedding = state.get("tok_emb.weight")
    vocab = classifier[-1] if len(classifier) == 3 else classifier[0]
    of_condition, length = shape_of(state, "cond_emb.weight", what)[0], shape_of(state, "pos_emb_cond", what)[1]
    reads_text = {"caption_words": of_condition, "caption_length": length}
    condition = reads_text if length > 1 else {"num_classes": of_condition}
    return {
        "grid": (side, cells // side),
        "depth": depth,
        "vocab_size": vocab,
        "code_dim": codes,
        "dim": dim,
        "spatial_layers": count_of(state, r"body_transformer\.blocks\.(\d+)\."),
        "depth_layers": count_of(state, r"head_transformer\.blocks\.(\d+)\."),
        "spatial_heads": max(1, dim // 64),
        "depth_heads": max(1, dim // 64),
        **condition,
        "spatial_reads_codes": "input_mlp.weight" in state,
        "depth_reads_codes": "head_mlp.weight" in state,
        "shared_embedding": embedding is None or len(embedding) == vocab,
        "shared_classifier": len(classifier) == 2,
    }
