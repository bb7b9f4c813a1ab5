"""LlamaGen's decoding step in C, compiled on first use: on a processor its time is the time to read the weights.

`native.c` holds the step; this module builds it with the machine's C compiler, keeps the library in the cache folder,
and calls it with the model's own weights. Weights that are bfloat16 numbers, as those of every bundled model, are read
as such: half the bytes, and not a bit of difference. Where there is no compiler, `is_available` is false, and
`studio.models.packed` is the next best.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import weakref
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from studio.errors import StudioError
from studio.files import cache_folder
from studio.models.kv_cache import KVCache

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-std=c11", "-fopenmp", "-fPIC", "-shared")
MOST_ROWS = 16
_LANES = 8

logger = logging.getLogger(__name__)


class _Network(ctypes.Structure):
    """The struct `Network` of native.c: matrices are (out, in); a list has an entry per layer."""

    _fields_ = (
        [(name, ctypes.c_int32) for name in ("dim", "heads", "kv_heads", "head_dim", "hidden", "layers", "vocab")]
        + [(name, ctypes.c_int32) for name in ("max_length", "bf16", "threads")]
        + [("eps", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("wqkv", "wo", "w1", "w3", "w2", "output")]
        + [(name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "norm")]
    )


@cache
def _library():
    """The compiled step, or `None` where it cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or os.environ.get("STUDIO_NATIVE") == "0":
        return None
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    file = cache_folder() / f"native-{key}.so"
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.{os.getpid()}.part")
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            partial.replace(file)
        step = ctypes.CDLL(str(file)).studio_step
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("No compiled decoding step (%s): %s", compiler, getattr(error, "stderr", None) or error)
        return None
    pointer, number, wide = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    step.argtypes = (pointer, number, number, pointer, wide, pointer, wide, pointer, pointer, pointer, pointer)
    step.restype = None
    return step


def _processor() -> str:
    """What `-march=native` depends on, so that a cache folder shared between machines holds a library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.machine() + platform.processor()


def is_available(model) -> bool:
    """Whether this model runs in C here: float32 on a CPU, sizes in eights, and a compiler that works."""
    config = model.config
    hidden = model.layers[0].feed_forward.w1.out_features
    fits = not any(size % _LANES for size in (config.dim, model.head_dim, hidden, config.vocab_size))
    return model.device.type == "cpu" and model.dtype == torch.float32 and fits and _library() is not None


class NativeLlamaGen:
    """The cached-decoding calls of `LlamaGen` (`new_cache`, `prefill`, `extend`), single tokens of up to 16 rows in C.

    Everything else (the prefix, several tokens at once, more rows) runs through the model itself. Results differ from
    the model's own by rounding only.

    Errors: `StudioError` for a model that `is_available` refuses.
    """

    @torch.no_grad()
    def __init__(self, model):
        if not is_available(model):
            raise StudioError(
                "Native decoding needs a float32 model on the CPU with sizes divisible by 8, and a C compiler (cc) "
                "on the path; leave out weights to use what works here."
            )
        self._model, self._step = weakref.ref(model), _library()
        config, layers = model.config, model.layers
        self.prefix_length, self.num_tokens = model.prefix_length, model.num_tokens
        matrices = {
            "wqkv": [layer.attention.wqkv.weight for layer in layers],
            "wo": [layer.attention.wo.weight for layer in layers],
            "w1": [layer.feed_forward.w1.weight for layer in layers],
            "w3": [layer.feed_forward.w3.weight for layer in layers],
            "w2": [layer.feed_forward.w2.weight for layer in layers],
            "output": [model.output.weight],
        }
        vectors = {
            "attention_norm": [layer.attention_norm.weight for layer in layers],
            "ffn_norm": [layer.ffn_norm.weight for layer in layers],
            "norm": [model.norm.weight],
        }
        halves = all(torch.equal(w.bfloat16().float(), w) for group in matrices.values() for w in group)
        dtype = torch.bfloat16 if halves else torch.float32
        self._kept = {name: [w.detach().to(dtype).contiguous() for w in group] for name, group in matrices.items()}
        self._kept |= {name: [w.detach().contiguous() for w in group] for name, group in vectors.items()}
        self.weight_bytes = sum(w.nbytes for group in self._kept.values() for w in group)
        self._pointers = {name: _pointers(group) for name, group in self._kept.items()}
        heads = config.num_heads
        self.network = _Network(
            dim=config.dim, heads=heads, kv_heads=config.num_kv_heads or heads, head_dim=model.head_dim,
            hidden=layers[0].feed_forward.w1.out_features, layers=len(layers), vocab=config.vocab_size,
            bf16=halves, eps=config.norm_eps,
        )  # fmt: skip
        for name, group in self._kept.items():
            alone = name in ("output", "norm")
            setattr(self.network, name, group[0].data_ptr() if alone else ctypes.addressof(self._pointers[name]))
        width = self._kept["wqkv"][0].shape[0]
        self._row_numbers = width + heads * model.head_dim + 2 * self.network.hidden
        self._embedding, self._rope = model.tok_embeddings.weight.detach(), model.rope().contiguous()

    @property
    def model(self):
        return self._model()

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for `rows` sequences."""
        return self.model.new_cache(rows)

    def prefill(self, prefix: torch.Tensor, valid: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Stores the prefix (rows, T, dim) in an empty cache; logits (rows, V) of the first image token."""
        return self.model.prefill(prefix, valid, cache)

    def extend(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Feeds tokens (rows, n) behind what the cache holds; logits (rows, n, V) of the tokens after them."""
        rows, new = tokens.shape
        if new != 1 or rows > MOST_ROWS:
            return self.model.extend(tokens, cache)
        if cache.length >= cache.max_length:
            raise StudioError(f"The key/value cache holds {cache.max_length} positions and is full.")
        network, store = self.network, cache.layers[0]
        network.max_length, network.threads = cache.max_length, torch.get_num_threads()
        bias = cache.attention_mask(1)
        x = F.embedding(tokens[:, 0], self._embedding)
        own = rows * network.dim + network.max_length + _LANES
        scratch = torch.empty(rows * self._row_numbers + network.threads * own)
        logits = torch.empty(rows, 1, network.vocab)
        caches = _pointers(cache.layers)
        self._step(
            ctypes.byref(network), rows, cache.length, caches, store.stride(0),
            None if bias is None else bias.data_ptr(), 0 if bias is None else bias.stride(0),
            self._rope[cache.length].data_ptr(), x.data_ptr(), scratch.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        cache.advance(1)
        return logits


def _pointers(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
