"""A transformer block that maps some rows by a matrix and leaves the others as they are, by algebra.

One number of a row marks those to be mapped. Hidden units read it and are open to marked rows and closed to others, as
GELU is for numbers well above and below zero; what they add is fitted by least squares.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

OPEN = 4.0
"""What opens or closes a unit, beside what it reads of a row, whose standard deviation is `READ`."""

READ = 0.5


@torch.no_grad()
def add_map_of_marked(
    block: Any, change: torch.Tensor, mark: int, rows: torch.Tensor, run: Callable[[], object]
) -> None:
    """Lets a `Block` add `change` x to every marked row x; as many of its hidden units as needed are given up for that.

    Args:
        block: of a `LatentTransformer`.
        change: (width, width).
        mark: which number of a row is about zero but for marked rows, where it is large.
        rows: where in the sequence the marked rows are.
        run: runs the network over some examples.
    """
    inputs = []
    handle = block.ln_2.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    run()
    handle.remove()
    x = inputs[0][:, rows].flatten(0, 1)
    seen = block.ln_2(x)
    centre = seen.mean(0)
    readers = torch.linalg.svd(change).Vh[: torch.linalg.matrix_rank(change)]
    units, first, second = len(readers) + 1, block.mlp.c_fc, block.mlp.c_proj
    weight = first.weight[:units].zero_()
    weight[:-1] = readers * (READ / (seen @ readers.T).std(0))[:, None]
    first.bias[:units] = -OPEN - weight @ centre
    weight[:, mark] += 2 * OPEN / centre[mark]
    hidden = F.gelu(first(seen))[:, :units]
    second.weight[:, :units] = torch.linalg.lstsq(hidden, x @ change.T).solution.T
