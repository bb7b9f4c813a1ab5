"""Drawing stacks of residual codes: cell by cell in raster order, and in each cell level by level, coarse to fine.

The order of RQ-Transformer (arXiv:2203.01941, section 3.2). There is one call of the spatial transformer per cell and
one of the depth transformer per code.
"""

from collections.abc import Callable, Sequence

import torch

from studio.decoding.sampling import Sampling
from studio.errors import StudioError


@torch.no_grad()
def cell_by_cell(
    model: torch.nn.Module,
    condition: torch.Tensor,
    codebooks: list[torch.Tensor] | None = None,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | Sequence[Sampling] | None = None,
    on_cell: Callable[[int, torch.Tensor], bool | None] | None = None,
) -> torch.Tensor:
    """Draws B pictures: codes (B, h, w, D), int64; those of cells that were not reached are -1.

    Args:
        model: an `RQTransformer` in evaluation mode.
        condition: classes or words (B, T).
        codebooks: the tokenizer's code vectors (K_d, C) of each level, where the model reads them.
        generators: one per picture.
        sampling: one for all levels, or one of each.
        on_cell: called as (index, codes so far (B, h * w, D), a view that may be written to); True stops the loop.

    Errors: `StudioError` for a number of samplings that is not the number of levels.
    """
    (height, width), depth = model.config.grid, model.config.depth
    by_level = [sampling or Sampling()] * depth if not isinstance(sampling, Sequence) else sampling
    if len(by_level) != depth:
        raise StudioError(f"{depth} levels need one sampling or {depth} of them; got {len(by_level)}.")
    cells = torch.full((len(condition), height * width, depth), -1, device=condition.device)
    spatial, deep = model.new_caches(len(condition))
    context = model.first_context(condition, spatial)
    for index in range(height * width):
        if index > 0:
            context = model.next_context(cells[:, index - 1], index - 1, spatial, codebooks)
        for level in range(depth):
            logits = model.level_logits(context, cells[:, index, :level], deep, codebooks)
            cells[:, index, level] = by_level[level].draw(logits, generators)
        if on_cell is not None and on_cell(index, cells):
            break
    return cells.unflatten(1, (height, width))
