"""What limits a decoding with drafts: the price of a call that reads a tree, and the bounds of the machine."""

import statistics
import time

import torch

from studio.decoding.trees import trees_of
from studio.models.llamagen import LlamaGen


def call_seconds(model: LlamaGen, rows: int, nodes: int, repeats: int = 9) -> float:
    """Median seconds of one call for a path of n nodes in each of some rows, logits included, half down a picture."""
    view, device = model.for_decoding("auto"), model.device
    length = len(model.rope()) - model.num_tokens // 2
    prefix = torch.zeros(rows, length, model.config.dim, device=device)
    cache = view.new_tree_cache(rows, nodes)
    view.prefill_states(prefix.to(model.dtype), None, cache)
    cache.keep_all()
    tree = trees_of([([0] * nodes, list(range(-1, nodes - 1)))] * rows, device)
    positions = length + tree.depths
    seconds = []
    for _ in range(repeats + 2):
        _wait(device)
        began = time.perf_counter()
        view.logits(view.extend_tree(tree.tokens, cache, positions, tree.ancestors))
        _wait(device)
        seconds.append(time.perf_counter() - began)
        cache.forget()
    return statistics.median(seconds[2:])


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations a second of a square matrix product, at best."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
