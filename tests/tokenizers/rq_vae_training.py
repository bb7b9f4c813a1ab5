"""The authors' training of RQ-VAE's codebooks, and their soft targets: references for the residual quantiser.

Codebooks follow moving averages of the vectors that chose them, and unused codes restart (arXiv:2203.01941, section
3.1, after arXiv:1711.00937, appendix A.1): code k is the decayed sum of its vectors over their decayed, smoothed
number. Unused codes take vectors of the batch, which at the first step is an initialisation from data. Levels are
updated one after another, so with a shared codebook a level already searches what the levels before it have moved.

Deviations from the authors' code: sums are scattered instead of multiplied by a one-hot matrix; one process only.
"""

from collections.abc import Callable

import torch
from torch import nn

from studio.tokenizers.residual_quantizer import Quantized, ResidualQuantizer, distances, nearest, straight_through


class CodebookAverages(nn.Module):
    """Decayed numbers (K,) and sums (K, C) of the vectors that chose each code of one codebook (K, C).

    Args:
        codebook: code vectors to start from.
        decay: share of the past that a step keeps.
        eps: smoothing of the numbers.
    """

    def __init__(self, codebook: torch.Tensor, decay: float = 0.99, eps: float = 1e-5):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("cluster_size_ema", torch.zeros(len(codebook), device=codebook.device))
        self.register_buffer("embed_ema", codebook.detach().clone())

    @torch.no_grad()
    def update(
        self,
        codebook: torch.Tensor,
        vectors: torch.Tensor,
        codes: torch.Tensor,
        candidates: torch.Tensor | None = None,
    ) -> None:
        """Moves a codebook (K, C) in place after vectors (N, C) chose codes (N,).

        `candidates` (K, C): where codes start anew that less than one vector chose of late; None: they stay.
        """
        sizes, sums = self.cluster_size_ema, self.embed_ema
        chosen = torch.bincount(codes, minlength=len(codebook)).to(sizes.dtype)
        sizes.lerp_(chosen, 1 - self.decay)
        sums.lerp_(torch.zeros_like(sums).index_add_(0, codes, vectors), 1 - self.decay)
        if candidates is not None:
            unused = sizes < 1
            sums[unused], sizes[unused] = candidates[unused], 1
        total = sizes.sum()
        smoothed = total * (sizes + self.eps) / (total + len(codebook) * self.eps)
        codebook.copy_(sums / smoothed[:, None])


def restart_candidates(vectors: torch.Tensor, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Vectors (count, C) of a batch (N, C) in random order; too small a batch is repeated with a little noise."""
    if len(vectors) < count:
        vectors = vectors.repeat(-(-count // len(vectors)), 1)
        noise = torch.rand(vectors.shape, generator=generator, device=vectors.device)
        vectors = vectors + noise * 0.01 / vectors.shape[1] ** 0.5
    return vectors[torch.randperm(len(vectors), generator=generator, device=vectors.device)[:count]]


def learn_codebooks(
    quantizer: ResidualQuantizer,
    averages: list[CodebookAverages],
    vectors: torch.Tensor,
    candidates: Callable[[torch.Tensor, int], torch.Tensor] | None = restart_candidates,
) -> Quantized:
    """One step of training: vectors (..., C) are quantised while every level moves its codebook.

    Args:
        averages: one for each codebook of the quantiser.
        candidates: called as (residuals (N, C), K) for the new places of unused codes; None: they stay.

    Returns:
        As of the quantiser, with the code vectors as they were before they moved.
    """
    rest, levels, codes = vectors.detach().float().flatten(0, -2), [], []
    for level, table in enumerate(quantizer.tables):
        code = nearest(rest, table)
        chosen = table[code]
        averages[level % len(averages)].update(
            table, rest, code, None if candidates is None else candidates(rest, len(table))
        )
        levels.append(chosen)
        codes.append(code)
        rest = rest - chosen
    shape = vectors.shape[:-1]
    return straight_through(
        vectors, torch.stack(levels, dim=-2).unflatten(0, shape), torch.stack(codes, dim=-1).unflatten(0, shape)
    )


def soft_codes(
    quantizer: ResidualQuantizer, vectors: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft targets of the second stage (section 3.2.3): probabilities (..., D, K) and codes (..., D).

    softmax(-squared distance / temperature) at each level, along the nearest codes, or, with a generator, along codes
    sampled from these probabilities. Levels must be equally large.
    """
    rest, distributions, codes = vectors.float().flatten(0, -2), [], []
    for table in quantizer.tables:
        distribution = (-distances(rest, table) / temperature).softmax(dim=-1)
        if generator is None:
            code = distribution.argmax(dim=-1)
        else:
            code = torch.multinomial(distribution, 1, generator=generator)[:, 0]
        distributions.append(distribution)
        codes.append(code)
        rest = rest - table[code].float()
    shape = vectors.shape[:-1]
    return torch.stack(distributions, dim=-2).unflatten(0, shape), torch.stack(codes, dim=-1).unflatten(0, shape)
