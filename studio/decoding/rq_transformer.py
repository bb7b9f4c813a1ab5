"""Sampling stacks of residual codes: cell by cell in raster order, and in each cell level by level, coarse to fine.

The order of RQ-Transformer (arXiv:2203.01941, section 3.2). There is one call of the spatial transformer per cell and
one of the depth transformer per code. Deviation from the authors' code, which has no guidance: with classifier-free
guidance (arXiv:2207.12598) the rows of captions and their unconditional twins run as one batch, and every code is
sampled from `unconditional + scale * (conditional - unconditional)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from studio.checks import shown
from studio.decoding.autoregressive import check_schedule, guided_logits, is_guided, scheduled_scale
from studio.decoding.sampling import OnStep, Sampling
from studio.errors import StudioError
from studio.models.rq_transformer import RQTransformer


@dataclass(frozen=True)
class RQDecoding:
    """Settings of the loop.

    Args:
        levels: temperature and filters of each level, coarse to fine, in place of those of the call.
        guidance_schedule: "linear" lets guidance grow over the cells, "constant" does not; None leaves it to whoever
            samples.

    Raises:
        StudioError: for what is not a `Sampling` for each level.
    """

    levels: tuple[Sampling, ...] | None = None
    guidance_schedule: str | None = None

    def __post_init__(self) -> None:
        check_schedule(self.guidance_schedule)
        if self.levels is None:
            return
        if not isinstance(self.levels, list | tuple) or not all(isinstance(level, Sampling) for level in self.levels):
            raise StudioError(f"levels is one Sampling for each level, not {shown(self.levels)}.")


@torch.no_grad()
def rq_decoding(
    model: RQTransformer,
    condition: torch.Tensor,
    codebooks: list[torch.Tensor] | None = None,
    *,
    generators: list[torch.Generator],
    valid: torch.Tensor | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    guidance_scale: float = 1.0,
    guidance_schedule: str | None = None,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Samples B images: codes (B, h, w, D), int64; those of cells that were not reached are -1.

    Args:
        model: an `RQTransformer` in evaluation mode.
        condition: classes or words (B, T), or captions (B, T, C).
        codebooks: the tokenizer's code vectors (K_d, C) of each level, where the model reads them.
        generators: one per image.
        valid: which states of captions (B, T) are of words; all when None.
        sampling: one for all levels, or one of each.
        guidance_scale: of captions; 1 (or 0) is no guidance.
        guidance_schedule: as of `RQDecoding`.
        on_step: called as (index, codes so far (B, h * w, D), a view that may be written to); True stops the loop.

    Raises:
        StudioError: for a number of samplings that is not the number of levels, and for guidance of a model that has no
            unconditional rows.
    """
    (height, width), depth = model.config.grid, model.config.depth
    by_level = [sampling or Sampling()] * depth if not isinstance(sampling, Sequence) else sampling
    if len(by_level) != depth:
        raise StudioError(f"{depth} levels need one sampling or {depth} of them; got {len(by_level)}.")
    batch, streams = len(condition), 2 if is_guided(0, guidance_scale, -1) else 1
    drop = None if streams == 1 else torch.arange(2 * batch, device=condition.device) >= batch

    def rows(of_images):
        return of_images if streams == 1 else torch.cat((of_images, of_images))

    cells = torch.full((batch, height * width, depth), -1, device=condition.device)
    spatial, deep = model.new_caches(streams * batch)
    valid = None if valid is None else rows(valid)
    context = model.first_context(rows(condition), spatial, valid=valid, drop=drop)
    for index in range(height * width):
        if index > 0:
            context = model.next_context(rows(cells[:, index - 1]), index - 1, spatial, codebooks)
        scale = scheduled_scale(guidance_schedule, guidance_scale, (index + 1) / (height * width))
        for level in range(depth):
            logits = model.level_logits(context, rows(cells[:, index, :level]), deep, codebooks)
            logits = logits[:, : model.vocab_sizes[level]]
            if streams == 2:
                logits = guided_logits(logits, scale)
            cells[:, index, level] = by_level[level].sample(logits, generators)
        if on_step is not None and on_step(index, cells):
            break
    return cells.unflatten(1, (height, width))
