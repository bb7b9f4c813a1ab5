"""T5 encoders (arXiv:1910.10683) over products in C (`native.c`) for CPUs.

A prompt has a few tokens, so that starting the operations of transformers' module takes longer than their work. Here a
block is a dozen calls, on weights that are packed once.
"""

import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5EncoderModel

from studio.backends.cpu_c import NativeProduct
from studio.backends.native_library import library

_LANES = 8
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def can_encode(encoder: nn.Module) -> bool:
    """Whether an encoder runs in C on this machine.

    This needs a `T5EncoderModel` in float32 on a CPU, sizes that are multiples of 8, and a working compiler.
    """
    if type(encoder) is not T5EncoderModel:
        return False
    config = encoder.config
    sizes = (config.d_model, config.d_ff, config.num_heads * config.d_kv)
    fits = config.dense_act_fn in _ACTIVATIONS and not any(size % _LANES for size in sizes)
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in encoder.parameters())
    return fits and plain and library() is not None


class NativeT5:
    """The states of a `T5EncoderModel` for which `can_encode` is true; results differ by rounding only."""

    @torch.no_grad()
    def __init__(self, encoder: Any):
        config = encoder.config
        self._embedding = encoder.shared.weight.detach()
        self._heads, self._eps = config.num_heads, config.layer_norm_epsilon
        self._act = _ACTIVATIONS[config.dense_act_fn]
        self._gated = config.is_gated_act
        self._norm = encoder.encoder.final_layer_norm.weight.detach().clone()
        self._blocks = [self._packed(*block.layer) for block in encoder.encoder.block]
        first: Any = weakref.proxy(encoder.encoder.block[0].layer[0].SelfAttention)
        self._bias = lru_cache(maxsize=64)(lambda n: first.compute_bias(n, n))

    def _packed(self, attention: Any, feed_forward: Any) -> tuple:
        heads, dense = attention.SelfAttention, feed_forward.DenseReluDense
        inner = (dense.wi_0, dense.wi_1) if self._gated else (dense.wi,)
        return (
            attention.layer_norm.weight.detach().clone(),
            NativeProduct(torch.cat([part.weight for part in (heads.q, heads.k, heads.v)])),
            NativeProduct(heads.o.weight),
            feed_forward.layer_norm.weight.detach().clone(),
            NativeProduct(torch.cat([part.weight for part in inner])),
            NativeProduct(dense.wo.weight),
        )

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """States (B, n, d_model) of tokens (B, n), none of them padding."""
        x, bias = F.embedding(ids, self._embedding), self._bias(ids.shape[1])
        width = x.shape[-1:]
        for attention_norm, qkv, out, norm, inner, outer in self._blocks:
            parts = qkv(F.rms_norm(x, width, attention_norm, self._eps)).unflatten(-1, (3, self._heads, -1))
            queries, keys, values = parts.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
            x = x + out(mixed.transpose(1, 2).flatten(2))
            hidden = inner(F.rms_norm(x, width, norm, self._eps))
            if self._gated:
                gate, up = hidden.chunk(2, dim=-1)
                hidden = self._act(gate) * up
            else:
                hidden = self._act(hidden)
            x = x + outer(hidden)
        return F.rms_norm(x, width, self._norm, self._eps)
