"""The slow, obviously right sampler: the reference of tests and benchmarks.

A growing cache by concatenation, both streams to the end, every projection on its own, masks built anew each step: the
decoding loop as a textbook (and the authors' sampler, arXiv:2406.06525) has it. It shares the model's modules with the
fast path but none of its caching or packing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from studio.decoding.sampling import Sampling
from studio.models.llamagen import LlamaGen


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (2j, 2j + 1) of x (rows, n, heads, head_dim) by table (n, head_dim // 2, 2)."""
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    turned = torch.empty_like(x, dtype=torch.float32)
    turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    turned[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return turned.type_as(x)


def _attend(attention, x, rope, past: tuple | None, mask: torch.Tensor):
    """One attention layer over x (rows, n, dim) behind `past` keys and values; returns its output and the new past."""
    rows, n, dim = x.shape
    heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    queries, keys, values = attention.wqkv(x).split((dim, kv_heads * head_dim, kv_heads * head_dim), dim=-1)
    queries = _rotate(queries.view(rows, n, heads, head_dim), rope).transpose(1, 2)
    keys = _rotate(keys.view(rows, n, kv_heads, head_dim), rope).transpose(1, 2)
    values = values.view(rows, n, kv_heads, head_dim).transpose(1, 2)
    if past is not None:
        keys, values = torch.cat((past[0], keys), dim=2), torch.cat((past[1], values), dim=2)
    repeated = [part.repeat_interleave(heads // kv_heads, dim=1) for part in (keys, values)]
    out = F.scaled_dot_product_attention(queries, repeated[0], repeated[1], attn_mask=mask)
    return attention.wo(out.transpose(1, 2).reshape(rows, n, dim)), (keys, values)


def _mask(start: int, n: int, valid: torch.Tensor | None, device) -> torch.Tensor:
    """True where queries start..start+n see keys 0..start+n: causal and not padding, or themselves."""
    queries = torch.arange(start, start + n, device=device)[:, None]
    keys = torch.arange(start + n, device=device)[None, :]
    mask = keys <= queries
    if valid is None:
        return mask
    shown = torch.ones(len(valid), start + n, dtype=torch.bool, device=device)
    shown[:, : valid.shape[1]] = valid
    return ((mask & shown[:, None]) | (keys == queries))[:, None]


@torch.no_grad()
def textbook(
    model: LlamaGen,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    rises: bool = False,
    on_logits: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Tokens (B, N) of a `LlamaGen`. `on_logits(index, logits (B, V))` may return the tokens to use.

    With `rises` guidance grows linearly over the tokens, as of ELM (arXiv:2410.16257).
    """
    sampling = sampling or Sampling()
    guided = guidance_scale not in (0, 1)
    prefix, valid = model.embed_condition(**condition)
    if guided:
        everything = torch.ones(len(prefix), dtype=torch.bool, device=prefix.device)
        null, _ = model.embed_condition(**condition, drop=everything)
        prefix = torch.cat((prefix, null))
        valid = None if valid is None else torch.cat((valid, valid))
    plan = model.region_conditioning(prefix)
    pasts: list = [None] * len(model.layers)
    tokens: list[torch.Tensor] = []
    x, start = prefix, 0
    for index in range(model.num_tokens):
        n = x.shape[1]
        rope, mask = model.rope()[start : start + n], _mask(start, n, valid, x.device)
        if plan is not None:
            x = x + plan[:, start : start + n]
        layer: Any
        for number, layer in enumerate(model.layers):
            attended, pasts[number] = _attend(layer.attention, layer.attention_norm(x), rope, pasts[number], mask)
            x = x + attended
            x = x + layer.feed_forward(layer.ffn_norm(x))
        start += n
        logits = model.output(model.norm(x))[:, -1].float()
        if guided:
            conditional, null_logits = logits.chunk(2)
            inside = cfg_interval < 0 or index == 0 or index - 1 <= cfg_interval
            scale = 1 + (guidance_scale - 1) * (index + 1) / model.num_tokens if rises else guidance_scale
            logits = null_logits + scale * (conditional - null_logits) if inside else conditional
        chosen = on_logits(index, logits) if on_logits is not None else None
        token = sampling.sample(logits, generators) if chosen is None else chosen
        tokens.append(token)
        x = model.tok_embeddings(torch.cat((token, token)) if guided else token)[:, None]
    return torch.stack(tokens, dim=1)
