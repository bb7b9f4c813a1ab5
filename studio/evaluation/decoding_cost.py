"""What limits a decoding with drafts: the price of a call that reads a tree, and the bounds of the machine."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from studio.decoding.trees import trees_of
from studio.models.llamagen import LlamaGen

_IN_A_ROW = 4


def call_seconds(model: LlamaGen, rows: int, nodes: int, repeats: int = 9) -> float:
    """Median seconds of one call for a path of n nodes in each of some rows, logits included, half down a picture."""
    call = _prepared(model, rows, nodes)
    return statistics.median([_timed(call, model.device) for _ in range(repeats + 2)][2:])


def least_call_seconds(
    model: LlamaGen, rows: int, sizes: Sequence[int], seconds: float = 5.0, repeats: int = 3
) -> dict[int, float]:
    """The same for several numbers of nodes, measured in turns: the least seconds of each.

    Args:
        model: the model, whose fastest view runs.
        rows: sequences of a call; two for one guided image.
        sizes: numbers of nodes.
        seconds: how long to measure in all, at least.
        repeats: rounds over all sizes, at least; in each, a size is called several times, as decoding does.
    """
    calls = {nodes: _prepared(model, rows, nodes) for nodes in sizes}
    least = {nodes: float("inf") for nodes in sizes}
    for call in calls.values():
        _timed(call, model.device)
    began, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() - began < seconds:
        for nodes, call in calls.items():
            least[nodes] = min(least[nodes], *(_timed(call, model.device) for _ in range(_IN_A_ROW)))
        rounds += 1
    return least


def _prepared(model: LlamaGen, rows: int, nodes: int) -> Callable[[], None]:
    """A call for a path of n nodes in each row, half down a picture, which leaves the cache as it was."""
    view, device = model.for_decoding("auto"), model.device
    last = len(model.rope()) - 1
    length = last + 1 - model.num_tokens // 2
    prefix = torch.zeros(rows, length, model.config.dim, device=device)
    cache = view.new_tree_cache(rows, nodes)
    with torch.no_grad():
        view.prefill_states(prefix.to(model.dtype), None, cache)
    cache.keep_all()
    tree = trees_of([([0] * nodes, list(range(-1, nodes - 1)))] * rows, device)
    positions = (length + tree.depths).clamp(max=last)
    tokens, visible = tree.tokens, tree.ancestors

    @torch.no_grad()
    def call():
        view.logits(view.extend_tree(tokens, cache, positions, visible))
        cache.forget()

    return call


def _timed(call: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


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
