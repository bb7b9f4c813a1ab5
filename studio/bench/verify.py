"""How long one verification of a draft tree takes, beside the authors' way of doing it."""

import time

import torch

from studio.bench.models import check_counts, check_fits
from studio.checks import check_integer
from studio.decoding.lantern import Relaxation, neighbour_table
from studio.decoding.sampling import Sampling
from studio.decoding.trees import MAX_NODES, DynamicTree, Tree, grow
from studio.decoding.verification import verify
from studio.reference.lantern import AuthorsRelaxation
from studio.reference.verification import leaf_paths, textbook_verify

_CODE_DIM = 8
_DELTA = 0.1
MAX_VOCAB = 1 << 20


def bench_verify(
    *,
    vocab: int = 16384,
    nodes: int = 59,
    k: int = 1000,
    trees: int = 20,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Times relaxed verification (tv_budget 0.1) of dynamic trees of random logits, one image, on the CPU.

    Args:
        vocab: codes of the codebook, random vectors of 8 numbers.
        nodes: of a tree, with the root; at most 5 levels, 10 children a node.
        k: nearest codes that count.
        trees: trees of a run; every run takes both sides through the same trees and random numbers, in turn.
        repeats: runs; the fastest of each side counts. The threads are those torch is set to.

    Returns:
        `{"ms", "reference_ms"}`, milliseconds for a tree; the reference applies the authors' rule.

    Raises:
        StudioError: for sizes that do not fit together or into memory.
    """
    check_counts(trees=trees, repeats=repeats)
    vocab, nodes = check_integer("vocab", vocab, 2, MAX_VOCAB), check_integer("nodes", nodes, 2, MAX_NODES)
    k = check_integer("k", k, 1, vocab - 1)
    needed = 4 * vocab * (k + 1 + 2 * nodes * (trees + 1))
    check_fits(f"A run of {trees} trees of {nodes} nodes over {vocab} codes", needed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    width = min(k + 1, vocab - 1)
    table = neighbour_table(torch.randn(vocab, _CODE_DIM, generator=generator), width)
    ours = Relaxation(table, k, tv_budget=_DELTA)
    authors = AuthorsRelaxation(table, k, tv_budget=_DELTA)
    sampled = [_random_case(vocab, nodes, generator) for _ in range(trees)]
    prepared = [(leaf_paths(tree), tree.tokens[0], numbers[0].tolist()) for tree, _, numbers in sampled]
    sampling = Sampling()
    times = {"ms": float("inf"), "reference_ms": float("inf")}
    for _ in range(repeats):
        began = time.perf_counter()
        for tree, logits, numbers in sampled:
            verify(tree, logits, numbers, sampling, ours)
        middle = time.perf_counter()
        for (_, logits, _), (paths, tokens, uniform) in zip(sampled, prepared):
            textbook_verify(paths, tokens, logits[0], uniform, sampling, authors)
        ended = time.perf_counter()
        times["ms"] = min(times["ms"], 1000 * (middle - began) / trees)
        times["reference_ms"] = min(times["reference_ms"], 1000 * (ended - middle) / trees)
    return times


def _random_case(vocab: int, nodes: int, generator: torch.Generator) -> tuple[Tree, torch.Tensor, torch.Tensor]:
    """A tree that grew on random distributions, target logits near those, and uniform numbers."""
    shape = DynamicTree(nodes=nodes)

    def behind(*size):
        return (3 * torch.randn(*size, vocab, generator=generator)).log_softmax(dim=-1)

    tree = grow(shape, torch.zeros(1, dtype=torch.long), behind(1), lambda tokens, _: behind(*tokens.shape),
                torch.tensor([shape.levels]))  # fmt: skip
    tree.children, tree.token_lists  # noqa: B018 - known before verification, as in decoding
    logits = 3 * torch.randn(1, tree.tokens.shape[1], vocab, generator=generator)
    return tree, logits, torch.rand(1, tree.tokens.shape[1], generator=generator)
