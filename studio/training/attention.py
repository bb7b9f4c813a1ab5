"""Attention while training on a CPU, where the backward pass of PyTorch's fused attention is slow in bf16."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

LONGEST = 256
"""Keys, at most, for which plain products are faster."""


class PlainAttention(TorchFunctionMode):
    """In this context `scaled_dot_product_attention` is a row of plain products wherever that is faster.

    That is with bf16 autocast on a CPU, where gradients are wanted, of short sequences. All else stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and _is_faster(*args, **(kwargs or {})):
            return plain_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of bf16 numbers, by its definition; arguments and result are its own.

    A query that may attend to nothing gets the mean of all values, not zeros.
    """
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3) for part in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            lowest = torch.finfo(scores.dtype).min
            is_bool = attn_mask.dtype == torch.bool
            scores = (
                scores.masked_fill(~attn_mask, lowest) if is_bool else scores + attn_mask.bfloat16().clamp(min=lowest)
            )
        return F.dropout(scores.softmax(dim=-1), dropout_p) @ value


def _is_faster(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **further: Any) -> bool:
    on_cpu = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return on_cpu and wanted and key.shape[-2] <= LONGEST
