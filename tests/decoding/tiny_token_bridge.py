"""A `TokenBridge` of toy size, and its tokenizer."""

import torch

from studio.models.token_bridge import TokenBridge
from studio.tokenizers.token_bridge import TokenBridgeTokenizer

AUTOENCODER = {
    "block_out_channels": [4, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 6,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip

SIZES = {
    "grid_size": 3,
    "token_dim": 4,
    "levels": 5,
    "dimension_order": (2, 0, 3, 1),
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "head_width": 16,
    "head_depth": 2,
    "head_heads": 2,
    "num_classes": 3,
    "buffer_size": 2,
}


def tiny_token_bridge(**more):
    """Random weights, none of them zero."""
    torch.manual_seed(0)
    model = TokenBridge(**{**SIZES, **more}).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def tiny_bridge_tokenizer(side=6):
    """Two pixels a cell: images of this side to cells of four numbers, five levels each."""
    torch.manual_seed(0)
    autoencoder, order = {**AUTOENCODER, "sample_size": side}, SIZES["dimension_order"]
    return TokenBridgeTokenizer(
        {"autoencoder": autoencoder}, levels=SIZES["levels"], dimension_order=order, sample_size=side
    ).eval()
