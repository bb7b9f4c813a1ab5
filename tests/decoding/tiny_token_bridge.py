"""A `TokenBridge` of toy size."""

import torch

from studio.models.token_bridge import TokenBridge

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
