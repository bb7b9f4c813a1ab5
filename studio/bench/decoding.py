"""How fast tokens are sampled, beside a plain textbook sampler and the bound that memory sets.

The bound is the measured speed of reading the weights once per step, divided into tokens: no method that reads all
weights for each token of an image can pass it.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from studio import backends
from studio.bench.models import MOST_IMAGES, check_counts, check_fits, parse_sizes
from studio.checkpoints.loading import pick_device
from studio.checks import check_choice, check_integer, check_number
from studio.decoding.autoregressive import Autoregressive, autoregressive
from studio.decoding.sampling import Sampling
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen
from studio.reference.autoregressive import textbook

_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
_PACKED = {"float16": "float16", "fp16": "float16", "int8": "int8"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


_MOST = {"dim": 1 << 14, "layers": 256, "heads": 1024, "vocab": 1 << 20, "tokens": 1 << 14}


def bench_decoding(
    *,
    random: str,
    guidance_scale: float | None = None,
    batch_sizes: list[int] | tuple[int, ...] = (1,),
    dtypes: list[str] | tuple[str, ...] = ("float32",),
    device: str | None = None,
) -> dict:
    """Times random weights of the sizes in a text such as "dim=384,layers=8,heads=6,vocab=4096,tokens=256"."""
    return bench_random_decoding(
        **parse_sizes(random, _MOST),
        guidance=4.0 if guidance_scale is None else guidance_scale,
        device=pick_device(device),
        batch=list(batch_sizes),
        dtype=list(dtypes),
    )


def bench_random_decoding(
    dim: int = 384,
    layers: int = 8,
    heads: int = 6,
    vocab: int = 4096,
    tokens: int = 256,
    *,
    guidance: float = 4.0,
    batch: int | list[int] = 1,
    dtype: str | list[str] = "float32",
    top_k: int = 2000,
    device: str | torch.device = "cpu",
    repeats: int = 3,
) -> dict:
    """Times a class-conditional model of random weights.

    Args:
        tokens: image tokens an image; a square number.
        batch: images at a time; a list gives a row for each.
        dtype: "float32", "bfloat16", "float16" (float16 weights, float32 arithmetic) or "int8" (weights), or a list.
        repeats: runs of each side, in turn; the fastest counts.

    Returns:
        `{"rows": [{"batch", "dtype", "tokens_per_second", "bound_tokens_per_second", "reference_tokens_per_second",
        "speedup", "identical_tokens"}]}`. The reference is the textbook sampler in float32.

    Raises:
        StudioError: for sizes that do not fit together or into memory, a wrong guidance scale and an unknown dtype.
    """
    guidance = check_number("The guidance scale", guidance)
    sizes = {"dim": dim, "layers": layers, "heads": heads, "vocab": vocab, "tokens": tokens}
    dim, layers, heads, vocab, tokens = (check_integer(name, size, 1, _MOST[name]) for name, size in sizes.items())
    batches = [check_integer("batch", each, 1, MOST_IMAGES) for each in _listed(batch)]
    top_k = check_integer("top_k", top_k)
    check_counts(repeats=repeats)
    for name in (dtypes := _listed(dtype)):
        check_choice("dtype", name, {**_DTYPES, **_PACKED})
    side = round(tokens**0.5)
    if side * side != tokens:
        raise StudioError(f"tokens must be a square number, the grid's side squared, not {tokens}.")
    weights, cached = 12 * layers * dim**2 + 2 * vocab * dim, 4 * max(batches) * layers * tokens * dim
    check_fits("A model of these sizes", 4 * (weights + cached), torch.device(device))
    torch.manual_seed(0)
    model = LlamaGen(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        grid_size=side,
        num_classes=10,
        prefix_rope="zero",
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)
    model = model.to(device).eval()
    bandwidth = read_bandwidth(model)
    rows = []
    for images in batches:
        for name in dtypes:
            rows.append(_row(model, guidance, images, name, top_k, repeats, bandwidth))
    return {"rows": rows}


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _row(
    model: LlamaGen, guidance: float, images: int, name: str, top_k: int, repeats: int, bandwidth: float
) -> dict[str, Any]:
    precision = _DTYPES.get(name) or _PACKED[name]
    settings = Autoregressive(weights=_PACKED.get(name, "auto"))
    tested = model if precision != "bfloat16" else _copy(model, torch.bfloat16)
    sampling = Sampling(top_k=min(top_k, model.config.vocab_size))
    condition = _condition(model, images)

    def sample(loop: Callable, network, **more):
        seeded = [torch.Generator(model.device).manual_seed(seed) for seed in range(images)]
        matched = {
            key: value.to(network.dtype) if value.is_floating_point() else value for key, value in condition.items()
        }
        return loop(network, matched, generators=seeded, sampling=sampling, guidance_scale=guidance, **more)

    ours, reference = [], []
    fast = plain = torch.empty(0)
    gc.collect()
    sample(autoregressive, tested, settings=settings)
    for _ in range(repeats):
        seconds, fast = backends.timed(lambda: sample(autoregressive, tested, settings=settings).tokens, model.device)
        ours.append(seconds)
        seconds, plain = backends.timed(lambda: sample(textbook, model), model.device)
        reference.append(seconds)
    sampled = images * model.num_tokens
    view = backends.select(tested, settings.weights)
    step_bytes = getattr(view, "weight_bytes", None) or step_weights(model) * _BYTES[precision]
    return {
        "batch": images,
        "dtype": precision,
        "tokens_per_second": sampled / min(ours),
        "bound_tokens_per_second": images * bandwidth / step_bytes,
        "reference_tokens_per_second": sampled / min(reference),
        "speedup": min(reference) / min(ours),
        "identical_tokens": bool(torch.equal(fast, plain)),
    }


def _copy(model: LlamaGen, dtype: torch.dtype) -> LlamaGen:
    twin = LlamaGen.from_config(dict(model.config))
    twin.load_state_dict(model.state_dict())
    return twin.to(model.device, dtype).eval()


def _condition(model: LlamaGen, images: int) -> dict[str, torch.Tensor]:
    if model.config.num_classes is not None:
        return {"class_labels": torch.arange(images, device=model.device) % model.config.num_classes}
    shape = (images, model.config.caption_length, model.config.caption_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {
        "captions": noise.to(model.device),
        "caption_mask": torch.ones(shape[:2], dtype=torch.bool).to(model.device),
    }


def step_weights(model: LlamaGen) -> int:
    """Numbers read by one step: all blocks and the output layer, not the tables of which one row is read."""
    return sum(weight.numel() for part in (model.layers, model.norm, model.output) for weight in part.parameters())


def read_bandwidth(model: LlamaGen, repeats: int = 10) -> float:
    """Bytes a second at which a plain sum reads a buffer of the size of the model's step weights, at best."""
    buffer = torch.ones(step_weights(model), device=model.device)
    buffer.sum()
    return buffer.nbytes / min(backends.timed(buffer.sum, model.device)[0] for _ in range(repeats))
