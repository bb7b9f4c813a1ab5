"""Converters of the MAR authors' checkpoints (arXiv:2406.11838): the network, and its KL-16 autoencoder, which becomes
diffusers' `AutoencoderKL`, alone or in a pipeline.

Sizes come from the shapes of the weights. The averaged weights are taken where a file has them, as for all published
numbers.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from studio.checkpoints.class_names import imagenet_labels
from studio.checkpoints.loading import load
from studio.checkpoints.official import build, count_of, read_weights, renamed, save_new, shape_of
from studio.errors import StudioError
from studio.models.mar import MAR, PRESETS
from studio.pipelines.mar import MARPipeline
from studio.tokenizers.kl import KLTokenizer

_PLACES = (("model_ema",), ("model",), ("state_dict",), ())
_LATENT_CHANNELS = 16
_LATENT_SCALE = 0.2325
_PUBLISHED_HEADS = {sizes["encoder_dim"]: sizes["encoder_heads"] for sizes in PRESETS.values()}
_PUBLISHED_GUIDANCE = {PRESETS[size]["encoder_dim"]: scale for size, scale in {"B": 2.9, "L": 3.0, "H": 3.2}.items()}
_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def mar_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> MAR:
    """A `MAR` with these weights. Sizes are inferred; `config` overrides them (`encoder_heads`, `patch_size`, ...)."""
    return build(MAR, _mar_config(state) | config, state, "MAR")


def kl_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> AutoencoderKL:
    """An `AutoencoderKL` with the weights of MAR's autoencoder, sizes and the places of attention inferred."""
    inferred = _kl_config(state)
    levels = len(inferred["block_out_channels"])
    weights = {kl_name(name, levels): kl_weight(name, weight) for name, weight in state.items()}
    return build(AutoencoderKL, inferred | config, weights, "KL autoencoder of MAR")


def convert_mar(path: str | Path, out: str | Path, *, tokenizer: str | Path, drafter: str | Path | None = None) -> Path:
    """Write a whole pipeline folder from the authors' files, with their settings.

    Args:
        path: the file of the network.
        out: the folder to make.
        tokenizer: the file of the autoencoder, or the folder that it was converted to.
        drafter: the file of a smaller network, for continuous speculative decoding (arXiv:2411.11925).

    Raises:
        StudioError: a file that is no checkpoint or one of another architecture, or parts that do not fit.
    """
    transformer = mar_from_state_dict(read_weights(path, _PLACES))
    small = None if drafter is None else mar_from_state_dict(read_weights(drafter, _PLACES))
    image_tokenizer = read_kl_tokenizer(tokenizer)
    ours = transformer.config
    if image_tokenizer.latent_channels * ours.patch_size**2 != ours.token_dim:
        raise StudioError(f"{path} and {tokenizer} do not belong together: their latents have other sizes.")
    for name in ("grid_size", "token_dim", "patch_size", "num_classes"):
        if small is not None and small.config[name] != ours[name]:
            raise StudioError(f"{drafter} has {name} {small.config[name]}, {path} {ours[name]}: they must agree.")
    pipe = MARPipeline(
        image_tokenizer,
        transformer,
        drafter=small,
        default_guidance_scale=_PUBLISHED_GUIDANCE.get(ours.encoder_dim, 3.0),
        default_num_inference_steps=transformer.num_tokens,
        id2label=imagenet_labels(ours.num_classes),
    )
    return save_new(pipe, out)


def read_kl_tokenizer(source: str | Path) -> KLTokenizer:
    """MAR's autoencoder as a tokenizer: from the authors' file, or from a folder such as `convert_mar_vae` makes.

    Raises:
        StudioError: what is neither.
    """
    if not Path(source).is_dir():
        return KLTokenizer.from_autoencoder(kl_from_state_dict(read_weights(source, _PLACES)))
    loaded = load(source, device="cpu", dtype=torch.float32)
    if not isinstance(loaded, KLTokenizer):
        raise StudioError(f"{source} holds a {type(loaded).__name__}: give the folder of a KL autoencoder.")
    return loaded


def convert_mar_vae(path: str | Path, out: str | Path) -> Path:
    """Write MAR's autoencoder as a folder for diffusers' `AutoencoderKL.from_pretrained`.

    Raises:
        StudioError: as in `build`.
    """
    return save_new(kl_from_state_dict(read_weights(path, _PLACES)), out)


def _mar_config(state: dict[str, torch.Tensor]) -> dict:
    what = "MAR"
    num_classes, encoder_dim = shape_of(state, "class_emb.weight", what)
    _, tokens, decoder_dim = shape_of(state, "diffusion_pos_embed_learned", what)
    places = shape_of(state, "encoder_pos_embed_learned", what)[1]
    token_dim = shape_of(state, "z_proj.weight", what)[1]
    folded = token_dim // _LATENT_CHANNELS
    patch_size = round(folded**0.5) if token_dim % _LATENT_CHANNELS == 0 else 1
    return {
        "grid_size": round(tokens**0.5),
        "token_dim": token_dim,
        "patch_size": patch_size if patch_size**2 == folded else 1,
        **half_sizes(state, "encoder", encoder_dim),
        **half_sizes(state, "decoder", decoder_dim),
        "mlp_ratio": shape_of(state, "encoder_blocks.0.mlp.fc1.weight", what)[0] / encoder_dim,
        "num_classes": num_classes,
        "buffer_size": places - tokens,
        "head_width": shape_of(state, "diffloss.net.input_proj.weight", what)[0],
        "head_depth": count_of(state, r"diffloss\.net\.res_blocks\.(\d+)\."),
    }


def half_sizes(state: dict[str, torch.Tensor], half: str, dim: int) -> dict[str, int]:
    """Width, blocks and heads of the "encoder" or "decoder" of a `MaskedAutoencoder`."""
    return {
        f"{half}_dim": dim,
        f"{half}_depth": count_of(state, rf"{half}_blocks\.(\d+)\."),
        f"{half}_heads": _PUBLISHED_HEADS.get(dim, max(1, dim // 64)),
    }


def _kl_config(state: dict[str, torch.Tensor]) -> dict:
    what = "KL autoencoder of MAR"
    levels = range(count_of(state, r"encoder\.down\.(\d+)\."))
    attending = [f"encoder.down.{n}.attn.0.q.weight" in state for n in levels]
    attending_up = [f"decoder.up.{n}.attn.0.q.weight" in state for n in reversed(levels)]
    return {
        "in_channels": shape_of(state, "encoder.conv_in.weight", what)[1],
        "out_channels": shape_of(state, "decoder.conv_out.weight", what)[0],
        "block_out_channels": tuple(shape_of(state, f"encoder.down.{n}.block.0.conv1.weight", what)[0] for n in levels),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attending),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in attending_up),
        "layers_per_block": count_of(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shape_of(state, "post_quant_conv.weight", what)[1],
        "norm_num_groups": 32,
        "scaling_factor": _LATENT_SCALE,
        "sample_size": 256,
    }


def kl_name(name: str, levels: int) -> str:
    """diffusers' name of a weight of an autoencoder of that many levels; an unknown one comes back unchanged."""
    name = re.sub(
        r"\.attn(?:\.(\d+)|_1)\.(norm|q|k|v|proj_out)\.",
        lambda match: f".attentions.{match[1] or 0}.{_ATTENTION_NAMES[match[2]]}.",
        name,
    )
    name = re.sub(r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
    rules = (
        (r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"\.mid\.block_1\.", ".mid.resnets.0."),
        (r"\.mid\.block_2\.", ".mid.resnets.1."),
        (r"coder\.mid\.", "coder.mid_block."),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.downsample\.", ".downsamplers.0."),
        (r"\.upsample\.", ".upsamplers.0."),
        (r"coder\.norm_out\.", "coder.conv_norm_out."),
    )
    return renamed(name, rules)


def kl_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The projections of attention are 1x1 convolutions in the authors' file and linear layers in diffusers."""
    is_projection = re.search(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$", name)
    return weight.flatten(1) if is_projection else weight
