"""Converters of the LlamaGen authors' checkpoints (arXiv:2406.06525) to folders that `studio.load` takes.

Sizes come from the shapes of the weights.
"""

from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.class_names import imagenet_labels
from studio.checkpoints.distilled import read_student_state_dict, student_from_state_dict
from studio.checkpoints.drafter import read_drafter
from studio.checkpoints.foreign import check_folder, check_weights
from studio.checkpoints.loading import load_model
from studio.checkpoints.official import (
    ANY_PLACE,
    build,
    count_of,
    from_transformers_names,
    llama_sizes,
    read_weights,
    save_new,
    shape_of,
)
from studio.checks import shown
from studio.decoding.distilled import Distilled
from studio.errors import StudioError
from studio.models.distilled import DistilledStudent
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.tokenizers.vq import VQTokenizer

_IGNORED = {"freqs_cis", "quantize.codebook_used"}
_LANTERN_NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    "model.cls_embedding.": "cls_embedding.",
}
_PUBLISHED_GUIDANCE = {"c2i": 4.0, "t2i": 7.5}
_PUBLISHED_TOP_K = {"c2i": 2000, "t2i": 1000}
_PUBLISHED_GRIDS = {"c2i": 24, "t2i": 16}


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint file, out of whichever wrapper they are in.

    Raises:
        StudioError: a missing file, one that is no checkpoint, or one without weights.
    """
    return {name: weight for name, weight in read_weights(path, ANY_PLACE).items() if name not in _IGNORED}


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename LANTERN's layout of the same weights (arXiv:2410.03355) to the authors'; others come back unchanged."""
    if "model.embed_tokens.weight" not in state:
        return state
    renamed = {}
    for name, weight in from_transformers_names(state, "model.").items():
        prefix = next((old for old in _LANTERN_NAMES if name.startswith(old)), "")
        renamed[_LANTERN_NAMES.get(prefix, "") + name.removeprefix(prefix)] = weight
    return renamed


def gpt_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> LlamaGen:
    """A `LlamaGen` with these weights. Sizes are inferred; `config` overrides them (`num_heads`, `grid_size`, ...)."""
    state = official_names({name: weight for name, weight in state.items() if name not in _IGNORED})
    inferred = _gpt_config(state)
    inferred |= {name: value for name, value in config.items() if value is not None}
    return build(LlamaGen, inferred, state, "LlamaGen transformer")


def vq_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> VQTokenizer:
    """A `VQTokenizer` with these weights, sizes inferred."""
    state = {name: weight for name, weight in state.items() if name not in _IGNORED}
    return build(VQTokenizer, _vq_config(state) | config, state, "VQ tokenizer")


def _gpt_config(state: dict[str, torch.Tensor]) -> dict:
    what = "LlamaGen transformer"
    vocab, dim = shape_of(state, "tok_embeddings.weight", what)
    config = {"vocab_size": vocab, **llama_sizes(state, dim, what)}
    if "cls_embedding.uncond_embedding" in state:
        length, caption_dim = state["cls_embedding.uncond_embedding"].shape
        return config | {"caption_dim": caption_dim, "caption_length": length}
    return config | {"num_classes": shape_of(state, "cls_embedding.embedding_table.weight", what)[0] - 1}


def _vq_config(state: dict[str, torch.Tensor]) -> dict:
    what = "VQ tokenizer"
    base, channels = shape_of(state, "encoder.conv_in.weight", what)[:2]
    codes, code_dim = shape_of(state, "quantize.embedding.weight", what)

    levels = count_of(state, r"encoder\.conv_blocks\.(\d+)\.")
    widths = [shape_of(state, f"encoder.conv_blocks.{n}.res.0.conv1.weight", what)[0] for n in range(levels)]
    return {
        "in_channels": channels,
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "encoder_res_blocks": count_of(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_res_blocks": count_of(state, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "z_channels": shape_of(state, "encoder.conv_out.weight", what)[0],
        "code_dim": code_dim,
        "codebook_size": codes,
    }


def convert_llamagen_vq(vq_path: str | Path, out: str | Path) -> Path:
    """Write the authors' VQ-8 or VQ-16 file as a `VQTokenizer` folder."""
    return save_new(vq_from_state_dict(read_state_dict(vq_path)), out)


def convert_llamagen(
    gpt_path: str | Path,
    out: str | Path,
    kind: str,
    *,
    tokenizer: str | Path,
    text_encoder: str | Path | None = None,
    grid_size: int | None = None,
    drafter: str | Path | None = None,
    student: str | Path | None = None,
) -> Path:
    """Write a whole pipeline folder from the authors' files.

    Args:
        gpt_path: the transformer's file.
        out: the folder to make.
        kind: "c2i" (classes) or "t2i" (text).
        tokenizer: the VQ file, or a `VQTokenizer` folder.
        text_encoder: folder of a `T5EncoderModel` and its tokenizer; needed for "t2i" only.
        grid_size: tokens a side; the file does not tell. 24 for "c2i" (384 pixels), 16 for "t2i" when left out.
        drafter: LANTERN's file of a drafter for this transformer, or a `Drafter` folder.
        student: the file of a student that was distilled from this transformer, or a `DistilledStudent` folder.

    Raises:
        StudioError: a file that is no checkpoint or one of another architecture, or parts that do not fit.
    """
    if kind not in _PUBLISHED_GUIDANCE:
        raise StudioError(f'kind is "c2i" or "t2i", not {shown(kind)}.')
    if (kind == "t2i") != (text_encoder is not None):
        raise StudioError("A text-conditional model needs a text encoder's folder, a class-conditional one takes none.")
    grid_size = _PUBLISHED_GRIDS[kind] if grid_size is None else grid_size
    transformer = gpt_from_state_dict(read_state_dict(gpt_path), grid_size=grid_size)
    if (transformer.config.caption_dim is not None) != (kind == "t2i"):
        other = "class" if kind == "t2i" else "text"
        raise StudioError(f"{gpt_path} is {other}-conditional: convert it as {'c2i' if kind == 't2i' else 't2i'}.")
    image_tokenizer = _image_tokenizer(tokenizer)
    codes, vocab = image_tokenizer.config.codebook_size, transformer.config.vocab_size
    if codes != vocab:
        raise StudioError(
            f"{tokenizer} has {codes} codes but {gpt_path} samples from {vocab}: they do not belong together."
        )
    encoder, text_tokenizer = _text_parts(text_encoder, transformer) if text_encoder is not None else (None, None)
    pipe = LlamaGenPipeline(
        image_tokenizer,
        transformer,
        encoder,
        text_tokenizer,
        drafter=None if drafter is None else _drafter(drafter, transformer),
        student=None if student is None else _student(student, transformer),
        default_guidance_scale=_PUBLISHED_GUIDANCE[kind],
        default_top_k=_PUBLISHED_TOP_K[kind],
        lowercase_prompts=kind == "t2i",
        id2label=imagenet_labels(transformer.config.num_classes) if kind == "c2i" else None,
    )
    if student is not None:
        pipe.check_distilled(Distilled(), given=[])
    return save_new(pipe, out)


def _drafter(source, transformer: LlamaGen) -> Drafter:
    if Path(source).is_dir():
        drafter = load_model(Drafter, Path(source), torch.float32)
    else:
        sizes = {"grid_size": transformer.config.grid_size, "prefix_length": transformer.prefix_length}
        drafter = read_drafter(source, **sizes)
    drafter.check_target(transformer)
    return drafter


def _student(source, transformer: LlamaGen) -> DistilledStudent:
    if Path(source).is_dir():
        return load_model(DistilledStudent, Path(source), torch.float32)
    return student_from_state_dict(read_student_state_dict(source), grid_size=transformer.config.grid_size)


def _image_tokenizer(source) -> VQTokenizer:
    if Path(source).is_dir():
        return load_model(VQTokenizer, Path(source), torch.float32)
    return vq_from_state_dict(read_state_dict(source))


def _text_parts(folder, transformer: LlamaGen):
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        check_folder(Path(folder))
        safely: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        read_whole: Any = T5EncoderModel.from_pretrained  # returns a pair with output_loading_info
        encoder, info = read_whole(folder, output_loading_info=True, **safely)
        tokenizer = AutoTokenizer.from_pretrained(folder, **safely)
    except StudioError:
        raise
    except Exception as error:
        raise StudioError(f"{folder} is not the folder of a T5 encoder and its tokenizer.") from error
    check_weights(encoder.state_dict(), folder)
    if lacking := sorted(map(str, info["missing_keys"])):
        raise StudioError(f"{folder} is not a whole T5 encoder: {len(lacking)} missing weights, {lacking[0]}.")
    found, read = encoder.config.d_model, transformer.config.caption_dim
    if found != read:
        raise StudioError(f"{folder} encodes text to vectors of {found} numbers, but the transformer reads {read}.")
    return encoder.eval(), tokenizer
