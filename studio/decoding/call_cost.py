"""What a call of a model costs that reads several positions of each sequence."""

import time

import torch

from studio import backends
from studio.decoding.trees import trees_of
from studio.models.llamagen import LlamaGen


@torch.no_grad()
def least_call_seconds(model: LlamaGen, rows: int, nodes: int, weights: str = "auto", repeats: int = 4) -> float:
    """Least seconds of a few calls for a path of tokens in each of some sequences, logits included.

    Args:
        model: a `LlamaGen`.
        rows: sequences, unconditional ones included; each is half generated.
        nodes: tokens of a path.
        weights: how the model is run, as of `Autoregressive`.
    """
    view, device = backends.select(model, weights), model.device
    last = len(model.rope()) - 1
    length = last + 1 - model.num_tokens // 2
    cache = view.new_tree_cache(rows, nodes)
    cache.advance(length)
    cache.keep_all()
    tree = trees_of([([0] * nodes, list(range(-1, nodes - 1)))] * rows, device)
    positions, seconds = (length + tree.depths).clamp(max=last), []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        view.logits(view.extend_tree(tree.tokens, cache, positions, tree.ancestors))
        _wait(device)
        seconds.append(time.perf_counter() - began)
        cache.forget()
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
