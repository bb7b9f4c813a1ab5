"""Converters of the LlamaGen authors' checkpoints (arXiv:2406.06525) to folders that `studio.load` takes.

Files are read with `weights_only`; sizes come from the shapes of the weights; an unknown or missing key is an error.
"""

import argparse
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from studio.errors import StudioError
from studio.models.llamagen import PRESETS, LlamaGen, default_ffn_dim
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.tokenizers.vq import VQTokenizer

_WRAPPERS = ("model", "module", "state_dict")
_IGNORED = {"freqs_cis", "quantize.codebook_used"}
_LANTERN_NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    "model.cls_embedding.": "cls_embedding.",
}
_LANTERN_LAYER_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_PUBLISHED_GUIDANCE = {"c2i": 4.0, "t2i": 7.5}
_PUBLISHED_TOP_K = {"c2i": 2000, "t2i": 1000}
_PUBLISHED_GRIDS = {"c2i": 24, "t2i": 16}


def read_state_dict(path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint file, out of whichever wrapper they are in.

    Errors: `StudioError` for a missing file, for one that is no checkpoint, and for one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise StudioError(f"{path} is not a file: give the checkpoint's .pt file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StudioError(f"{path} is not a checkpoint of weights that can be read safely.") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise StudioError(f"{path} holds no state dict of weights.")
    return {name: weight for name, weight in content.items() if name not in _IGNORED}


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames LANTERN's layout of the same weights (arXiv:2410.03355) to the authors'; others come back unchanged."""
    if "model.embed_tokens.weight" not in state:
        return state
    renamed: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            layer, part = match.groups()
            if part in ("self_attn.k_proj", "self_attn.v_proj"):
                continue
            if part == "self_attn.q_proj":
                others = [state.get(name.replace("q_proj", other)) for other in ("k_proj", "v_proj")]
                if any(other is None for other in others):
                    raise StudioError(f"{name} has no k_proj and v_proj beside it: the checkpoint is not whole.")
                renamed[f"layers.{layer}.attention.wqkv.weight"] = torch.cat((weight, *others))
            else:
                renamed[f"layers.{layer}.{_LANTERN_LAYER_NAMES.get(part, part)}.weight"] = weight
            continue
        prefix = next((old for old in _LANTERN_NAMES if name.startswith(old)), "")
        renamed[_LANTERN_NAMES.get(prefix, "") + name.removeprefix(prefix)] = weight
    return renamed


def gpt_from_state_dict(state: dict[str, torch.Tensor], **config) -> LlamaGen:
    """A `LlamaGen` with these weights. Sizes are inferred; `config` overrides them (`num_heads`, `grid_size`, ...)."""
    state = official_names({name: weight for name, weight in state.items() if name not in _IGNORED})
    inferred = _gpt_config(state)
    inferred |= {name: value for name, value in config.items() if value is not None}
    with torch.device("meta"):
        model = LlamaGen(**inferred)
    return _fill(model, state, "LlamaGen transformer")


def vq_from_state_dict(state: dict[str, torch.Tensor], **config) -> VQTokenizer:
    """A `VQTokenizer` with these weights, sizes inferred."""
    state = {name: weight for name, weight in state.items() if name not in _IGNORED}
    inferred = _vq_config(state) | config
    with torch.device("meta"):
        model = VQTokenizer(**inferred)
    return _fill(model, state, "VQ tokenizer")


def _fill(model, state: dict[str, torch.Tensor], what: str):
    """Puts weights in a model made on the meta device, after every name and shape was found right."""
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


def _shape(state: dict[str, torch.Tensor], name: str, what: str) -> tuple[int, ...]:
    if name not in state:
        raise StudioError(f"This is not the checkpoint of a {what}: it has no {name}.")
    return tuple(state[name].shape)


def _gpt_config(state: dict[str, torch.Tensor]) -> dict:
    what = "LlamaGen transformer"
    vocab, dim = _shape(state, "tok_embeddings.weight", what)
    hidden = _shape(state, "layers.0.feed_forward.w1.weight", what)[0]
    layers = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"layers\.\d+\.", name))
    heads = next((p["num_heads"] for p in PRESETS.values() if p["dim"] == dim), max(1, dim // 64))
    config = {
        "vocab_size": vocab,
        "dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "ffn_dim": None if hidden == default_ffn_dim(dim) else hidden,
    }
    if "cls_embedding.uncond_embedding" in state:
        length, caption_dim = state["cls_embedding.uncond_embedding"].shape
        return config | {"caption_dim": caption_dim, "caption_length": length}
    return config | {"num_classes": _shape(state, "cls_embedding.embedding_table.weight", what)[0] - 1}


def _vq_config(state: dict[str, torch.Tensor]) -> dict:
    what = "VQ tokenizer"
    base, channels = _shape(state, "encoder.conv_in.weight", what)[:2]
    codes, code_dim = _shape(state, "quantize.embedding.weight", what)

    def count(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    levels = count(r"encoder\.conv_blocks\.(\d+)\.")
    widths = [_shape(state, f"encoder.conv_blocks.{n}.res.0.conv1.weight", what)[0] for n in range(levels)]
    return {
        "in_channels": channels,
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "encoder_res_blocks": count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "decoder_res_blocks": count(r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
        "z_channels": _shape(state, "encoder.conv_out.weight", what)[0],
        "code_dim": code_dim,
        "codebook_size": codes,
    }


@contextmanager
def _new_folder(out):
    """A temporary folder beside `out` that takes its name at the end, or vanishes on an error."""
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudioError(f"{out} exists already: choose another folder.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise StudioError(f"{out} cannot be written ({error.strerror}): choose another folder.") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_llamagen_vq(vq_path, out) -> Path:
    """Writes the authors' VQ-8 or VQ-16 file as a `VQTokenizer` folder."""
    model = vq_from_state_dict(read_state_dict(vq_path))
    with _new_folder(out) as folder:
        model.save_pretrained(folder)
    return Path(out)


def convert_llamagen(gpt_path, out, kind: str, *, tokenizer, text_encoder=None, grid_size: int | None = None) -> Path:
    """Writes a whole pipeline folder from the authors' files.

    Args:
        gpt_path: the transformer's file.
        out: the folder to make.
        kind: "c2i" (classes) or "t2i" (text).
        tokenizer: the VQ file, or a `VQTokenizer` folder.
        text_encoder: folder of a `T5EncoderModel` and its tokenizer; needed for "t2i" only.
        grid_size: tokens a side; the file does not tell. 24 for "c2i" (384 pixels), 16 for "t2i" when left out.

    Errors: `StudioError` for a file that is no checkpoint or one of another architecture, and for parts that do not
    fit.
    """
    if kind not in _PUBLISHED_GUIDANCE:
        raise StudioError(f'kind is "c2i" or "t2i", not {kind!r}.')
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
            f"{tokenizer} has {codes} codes but {gpt_path} draws from {vocab}: they do not belong together."
        )
    encoder, text_tokenizer = _text_parts(text_encoder, transformer) if text_encoder is not None else (None, None)
    pipe = LlamaGenPipeline(
        image_tokenizer,
        transformer,
        encoder,
        text_tokenizer,
        default_guidance_scale=_PUBLISHED_GUIDANCE[kind],
        default_top_k=_PUBLISHED_TOP_K[kind],
        lowercase_prompts=kind == "t2i",
    )
    with _new_folder(out) as folder:
        pipe.save_pretrained(folder)
    return Path(out)


def _image_tokenizer(source) -> VQTokenizer:
    if Path(source).is_dir():
        return VQTokenizer.from_pretrained(source, local_files_only=True)
    return vq_from_state_dict(read_state_dict(source))


def _text_parts(folder, transformer: LlamaGen):
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        encoder = T5EncoderModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise StudioError(f"{folder} is not the folder of a T5 encoder and its tokenizer.") from error
    found, read = encoder.config.d_model, transformer.config.caption_dim
    if found != read:
        raise StudioError(f"{folder} encodes text to vectors of {found} numbers, but the transformer reads {read}.")
    return encoder.eval(), tokenizer
