"""LlamaGen with prepacked weights, for fast sampling on a CPU without a compiler.

A step over two rows reads every weight once, so its time is the time to stream them. This backend prepacks each weight
matrix in the layout of torch's best small-batch kernel, joins w1 with w3, adds residuals inside the product, rotates
queries and keys in place, and writes keys and values with one copy.

Weights: "float32" (oneDNN blocked layout; plain products where torch has no oneDNN), and two smaller ones that trade
exactness for bandwidth: "float16" (half the bytes, float32 arithmetic) and "int8" (a quarter of the bytes, one scale
per output, activations quantised per call).
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from studio.backends.model_backend import ModelBackend
from studio.checks import shown
from studio.errors import StudioError
from studio.models.kv_cache import KVCache, TreeCache
from studio.models.llama_blocks import RMSNorm
from studio.models.llamagen import LlamaGen

WEIGHTS = ("float32", "float16", "int8")
_ROWS_HINT = 2

Product = Callable[..., torch.Tensor]


def can_pack(model: LlamaGen) -> bool:
    """True for a float32 model on a CPU with as many key/value heads as heads."""
    grouped = model.config.num_kv_heads not in (None, model.config.num_heads)
    return model.device.type == "cpu" and model.dtype == torch.float32 and not grouped


@cache
def _has_blocked_products() -> bool:
    """Whether this build of torch has oneDNN's prepacked products for this processor, tested on a small one."""
    try:
        x, weight = torch.ones(2, 16), torch.ones(8, 16)
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        product = torch.ops.mkldnn._linear_pointwise.binary(x, torch.ones(2, 8), blocks, None, "add")
        return torch.backends.mkldnn.is_available() and bool((product == 17).all())
    except (AttributeError, RuntimeError):
        return False


def _float32_product(weight: torch.Tensor) -> Product:
    """x, residual -> x @ weight.T (+ residual), with the weight stored in blocks."""
    if not _has_blocked_products():
        return _plain_product(weight)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    plain, added = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

    def product(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return plain(x, blocks, None, "none", [], "")
        return added(x, residual, blocks, None, "add")

    return product


def _plain_product(weight: torch.Tensor) -> Product:
    def product(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight) if residual is None else F.linear(x, weight).add_(residual)

    return product


def _fbgemm_product(call: Callable[[torch.Tensor], torch.Tensor]) -> Product:
    def product(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return call(x) if residual is None else call(x).add_(residual)

    return product


def _float16_product(weight: torch.Tensor) -> Product:
    prepacked = torch.ops.quantized.linear_prepack_fp16(weight, None)
    call = torch.ops.quantized.linear_dynamic_fp16
    return _fbgemm_product(lambda x: call(x, prepacked))


def _int8_product(weight: torch.Tensor) -> Product:
    scales = weight.abs().amax(dim=1).clamp(min=1e-8).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(weight), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    prepacked = torch.ops.quantized.linear_prepack(quantised, None)
    call = torch.ops.quantized.linear_dynamic
    return _fbgemm_product(lambda x: call(x, prepacked, True))


_PRODUCTS = {"float32": _float32_product, "float16": _float16_product, "int8": _int8_product}


def _behind_norm(norm: RMSNorm, *weights: torch.Tensor) -> torch.Tensor:
    """Weights joined along their outputs, times the RMS norm's weight and root of dim before them."""
    joined = torch.cat(weights) if len(weights) > 1 else weights[0]
    return joined.detach() * (norm.weight.detach() * joined.shape[1] ** 0.5)


class PackedLlamaGen(ModelBackend[LlamaGen]):
    """The cached-decoding calls of `LlamaGen`, for single tokens, several, and trees, over prepacked weights.

    Results differ from the model's own by rounding only (float32), or by the weights' precision.

    Raises:
        StudioError: unknown weights, a model for which `can_pack` is false, or smaller weights where this build of
            torch has no kernels for them.
    """

    @torch.no_grad()
    def __init__(self, model: LlamaGen, weights: str = "float32"):
        if weights not in WEIGHTS:
            raise StudioError(f"Weights are one of {', '.join(WEIGHTS)}, not {shown(weights)}.")
        if not can_pack(model):
            raise StudioError("Packed weights need a float32 model on the CPU with as many key/value heads as heads.")
        if weights != "float32" and "fbgemm" not in torch.backends.quantized.supported_engines:
            raise StudioError(f"This build of torch has no {weights} weights for the CPU; use float32.")
        make = _PRODUCTS[weights]
        super().__init__(model)
        self.heads, self.head_dim = model.config.num_heads, model.head_dim
        self.prefix_length, self.num_tokens, self.config = model.prefix_length, model.num_tokens, model.config
        self.device = model.device
        self.embedding = model.tok_embeddings.weight.detach()
        self.rope = torch.view_as_complex(model.rope().contiguous())
        layers: Any = model.layers
        self.layers = [
            (
                make(_behind_norm(layer.attention_norm, layer.attention.wqkv.weight)),
                make(layer.attention.wo.weight.detach()),
                make(_behind_norm(layer.ffn_norm, layer.feed_forward.w1.weight, layer.feed_forward.w3.weight)),
                make(layer.feed_forward.w2.weight.detach()),
            )
            for layer in layers
        ]
        self.output = make(model.output.weight.detach())
        self.norm = model.norm.weight.detach() * model.config.dim**0.5
        self.floor = torch.tensor(model.config.dim * model.config.norm_eps)

    def new_cache(self, rows: int) -> KVCache:
        """As `LlamaGen.new_cache`."""
        return self.model.new_cache(rows)

    def new_tree_cache(self, rows: int, pending: int) -> TreeCache:
        """As `LlamaGen.new_tree_cache`."""
        return self.model.new_tree_cache(rows, pending)

    def prefill(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.prefill`."""
        return self.logits(self.prefill_states(prefix, valid, cache)[:, -1])

    def prefill_states(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.prefill_states`."""
        length = prefix.shape[1]
        mask, rope = self.model.prefix_mask(valid, length), self.rope[:length]
        states = self._run_layers(self.model.prepare_inputs(prefix, cache), rope, mask, cache, length > 1)
        if valid is not None:
            cache.mask_prefix(valid)
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """As `LlamaGen.logits`."""
        return self.output(states.reshape(-1, states.shape[-1])).view(*states.shape[:-1], -1)

    def extend(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As `LlamaGen.extend`."""
        n = tokens.shape[1]
        x = cache.add_region_conditioning(F.embedding(tokens, self.embedding))
        rope = self.rope[cache.length : cache.length + n]
        return self.logits(self._run_layers(x, rope, cache.attention_mask(n), cache, False))

    def extend_tree(
        self, tokens: torch.Tensor, cache: TreeCache, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """As `LlamaGen.extend_tree`."""
        x = cache.add_region_conditioning(F.embedding(tokens, self.embedding), positions)
        return self._run_layers(x, self.rope[positions], cache.tree_mask(visible), cache, False)

    def _run_layers(
        self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, cache: KVCache, causal: bool
    ) -> torch.Tensor:
        rows, n, dim = x.shape
        heads, head_dim = self.heads, self.head_dim
        rope = rope[..., None, :]
        causal = causal and mask is None
        x = x.reshape(rows * n, dim)
        for index, (wqkv, wo, w13, w2) in enumerate(self.layers):
            qkv = wqkv(self._unit(x))
            torch.view_as_complex(qkv[:, : 2 * dim].view(rows, n, 2 * heads, head_dim // 2, 2)).mul_(rope)
            parts = qkv.view(rows, n, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
            keys, values = cache.update(index, parts[1:].transpose(0, 1))
            attended = F.scaled_dot_product_attention(parts[0], keys, values, attn_mask=mask, is_causal=causal)
            x = wo(attended.transpose(1, 2).reshape(rows * n, dim), x)
            gate, up = w13(self._unit(x)).chunk(2, dim=-1)
            x = w2(F.silu(gate).mul_(up), x)
        cache.advance(n)
        return (self._unit(x) * self.norm).view(rows, n, dim)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """x over the root of (its squared length + dim * eps): the norm short of the factor `_behind_norm` folds in."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.floor, length, length).rsqrt_()
