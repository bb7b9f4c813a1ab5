"""Converter of the TokenBridge authors' checkpoints (arXiv:2503.16430): network and autoencoder become a pipeline.

Sizes come from the shapes of the weights, levels from the file's own. The averaged weights are taken where a file has
them, as for all published numbers.
"""

from pathlib import Path
from typing import Any

from studio.checkpoints.class_names import imagenet_labels
from studio.checkpoints.mar import half_sizes, read_kl_tokenizer
from studio.checkpoints.official import State, build, count_of, read_weights, save_new, shape_of
from studio.errors import StudioError
from studio.models.token_bridge import TokenBridge
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.tokenizers.token_bridge import KL16_ORDER, TokenBridgeTokenizer

_PLACES = (("model_ema",), ("model",), ("state_dict",), ())
_WHAT = "TokenBridge network"
_OF_THE_HEAD = (
    "condition_proj.", "timesteps_embeddings", "channel_embed", "token_embeddings.", "channel_blocks.", "channel_norm.",
    "channel_final.", "channel_heads.",
)  # fmt: skip
_BUFFERS = {"channel_mask", "reconstruction_values", "boundaries"}
_PUBLISHED_SAMPLING: dict[int, dict[str, Any]] = {
    1024: {"default_guidance_scale": 3.1, "default_temperature": 0.96},
    1280: {"default_guidance_scale": 3.45, "default_temperature": 0.91},
}
"""By the width of the encoder: the sizes L and H."""


def token_bridge_from_state_dict(state: State, **config: Any) -> TokenBridge:
    """A `TokenBridge` with these weights. Sizes are inferred; `config` overrides them (`encoder_heads`, ...)."""
    inferred = _token_bridge_config(state)
    renamed = {
        f"head.{name}" if name.startswith(_OF_THE_HEAD) else name: weight
        for name, weight in state.items()
        if name not in _BUFFERS
    }
    return build(TokenBridge, inferred | config, renamed, _WHAT)


def convert_token_bridge(path: str | Path, out: str | Path, tokenizer: str | Path) -> Path:
    """Write a published TokenBridge as a pipeline folder for `studio.load`.

    Args:
        path: the authors' file of the network.
        out: the folder to make.
        tokenizer: the authors' file of the KL-16 autoencoder, or the folder that `convert_mar_vae` made of it.

    Raises:
        StudioError: a file that is no checkpoint or one of another architecture, or parts that do not fit.
    """
    state = read_weights(path, _PLACES)
    transformer = token_bridge_from_state_dict(state)
    levels = state["reconstruction_values"].float().tolist()
    autoencoder = read_kl_tokenizer(tokenizer)
    if autoencoder.latent_channels != transformer.config.token_dim:
        raise StudioError(f"{path} and {tokenizer} do not belong together: their latents have other sizes.")
    image_tokenizer = TokenBridgeTokenizer.from_autoencoder(
        autoencoder,
        levels=len(levels),
        reconstruction_values=levels,
        dimension_order=transformer.config.dimension_order,
    )
    pipe = TokenBridgePipeline(
        image_tokenizer,
        transformer,
        default_num_inference_steps=transformer.num_tokens,
        id2label=imagenet_labels(transformer.config.num_classes),
        **_PUBLISHED_SAMPLING.get(transformer.config.encoder_dim, {}),
    )
    return save_new(pipe, out)


def _token_bridge_config(state: State) -> dict:
    num_classes, encoder_dim = shape_of(state, "class_emb.weight", _WHAT)
    _, cells, decoder_dim = shape_of(state, "output_pos_embed", _WHAT)
    places = shape_of(state, "encoder_pos_embed_learned", _WHAT)[1]
    _, token_dim, head_width = shape_of(state, "channel_embed", _WHAT)
    return {
        "grid_size": round(cells**0.5),
        "token_dim": token_dim,
        "levels": shape_of(state, "reconstruction_values", _WHAT)[0],
        "dimension_order": KL16_ORDER if token_dim == len(KL16_ORDER) else None,
        **half_sizes(state, "encoder", encoder_dim),
        **half_sizes(state, "decoder", decoder_dim),
        "mlp_ratio": shape_of(state, "encoder_blocks.0.mlp.fc1.weight", _WHAT)[0] / encoder_dim,
        "head_width": head_width,
        "head_depth": count_of(state, r"channel_blocks\.(\d+)\."),
        "head_heads": head_width // shape_of(state, "channel_blocks.0.attn.q_norm.weight", _WHAT)[0],
        "num_classes": num_classes,
        "buffer_size": places - cells,
    }
