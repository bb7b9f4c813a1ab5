"""Generation then reconstruction (GtR): first a coarse grid of tokens, slowly, then what lies between them, fast.

"Generation then Reconstruction: Accelerating Masked Autoregressive Models via Two-Stage Sampling" (arXiv:2510.17171).
The first tokens decide what an image shows and the tokens between them are nearly determined, so the first get most
calls of the transformer. A checkerboard is split again and again: its odd half is sampled last, half of the rest before
it, and so on. No two tokens of a set share an edge, so tokens of one call depend little on each other.

The authors' code is not published. The sets and the ratio of tokens a call are the paper's; how other numbers of calls
are shared out is ours, and their denoising steps by frequency are left out: `studio.decoding.disa` lowers them.
"""

from collections.abc import Sequence

import torch

_WEIGHTS = (12, 3, 1)
"""Calls of the sets, in ratio: of 256 tokens, 2.67, 10.67 and 64 a call."""


def gtr_sets(side: int) -> torch.Tensor:
    """The set (side * side,), 0 to 2, of each position of a grid in raster order; set 0 is sampled first."""
    rows, columns = torch.arange(side)[:, None], torch.arange(side)
    diagonal = (rows + columns).flatten()
    last = len(_WEIGHTS) - 1
    sets = torch.zeros_like(diagonal)
    for halving in range(last, 0, -1):
        sets[diagonal % 2**halving != 0] = last + 1 - halving
    return sets


def gtr_order(order: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Random orders (B, L), whose end is sampled first, sorted by the sets (L,), as random as before within a set."""
    ranks = (-sets.to(order.device))[order].argsort(dim=1, stable=True)
    return order.gather(1, ranks)


def gtr_counts(sets: torch.Tensor, steps: int) -> list[int]:
    """Tokens that each of `steps` calls samples, first call first; None but as many calls as there are sets work."""
    sizes = [size for size in torch.bincount(sets).tolist() if size]
    counts: list[int] = []
    for size, calls in zip(sizes, _calls_of_sets(sizes, steps)):
        counts += [size * (call + 1) // calls - size * call // calls for call in range(calls)]
    return counts


def _calls_of_sets(sizes: Sequence[int], steps: int) -> list[int]:
    """Calls of each set: at least one, at most one a token, and between these as near to the ratio as it goes."""
    calls = [1] * len(sizes)
    for _ in range(steps - len(sizes)):
        open_sets = [index for index, size in enumerate(sizes) if calls[index] < size]
        calls[max(open_sets, key=lambda index: _WEIGHTS[index] / (calls[index] + 1))] += 1
    return calls
