"""What a call of a model costs that reads several positions of each sequence."""

import statistics
import time

import torch

from studio.decoding.trees import trees_of


@torch.no_grad()
def call_seconds(model: torch.nn.Module, rows: int, nodes: int, repeats: int = 9, weights: str = "auto") -> float:
    """Median seconds of one call for a path of tokens in each of some sequences, logits included.

    Args:
        model: a `LlamaGen`.
        rows: sequences, unconditional ones included; each is half generated.
        nodes: tokens of a path.
        weights: how the model is run, as of `Autoregressive`.
    """
    view, device = model.for_decoding(weights), model.device
    length = len(model.rope()) - model.num_tokens // 2
    cache = view.new_tree_cache(rows, nodes)
    cache.advance(length)
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
