"""Residual quantisation: a vector as a sum of code vectors, each of which quantises the residual of those before.

"Autoregressive Image Generation using Residual Quantization" (arXiv:2203.01941), section 3.1: level d takes the code
nearest to the residual r_(d-1) and leaves r_d = r_(d-1) - e_d(code). Codes are not normalised. The chain may start at
any level, and at another one for every vector: that is how ResGen (arXiv:2412.10208) turns a predicted sum of hidden
levels into their codes.

Scope: encoding and lookup. `studio.training.rvq` learns codebooks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from studio.errors import StudioError

_DISTANCES_AT_ONCE = 1 << 24


class Quantized(NamedTuple):
    """Output of the quantiser in training.

    Attributes:
        vectors: sums of all levels (..., C) with straight-through gradients.
        codes: (..., D) int64.
        commitment: mean over levels d of mean((z - S_d)^2), S_d the sum of levels 1 to d without gradient (equation 8).
    """

    vectors: torch.Tensor
    codes: torch.Tensor
    commitment: torch.Tensor


def straight_through(vectors: torch.Tensor, levels: torch.Tensor, codes: torch.Tensor) -> Quantized:
    """`Quantized` from vectors (..., C), the code vectors (..., D, C) of their levels, and the codes (..., D)."""
    sums = levels.detach().cumsum(dim=-2)
    commitment = (vectors[..., None, :] - sums).square().mean()
    return Quantized(vectors + (sums[..., -1, :] - vectors).detach(), codes, commitment)


def distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances (n, K), float32, of vectors (n, C) to codes (K, C)."""
    vectors, codebook = vectors.float(), codebook.float()
    norms = vectors.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    return torch.addmm(norms, vectors, codebook.T, alpha=-2)


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices (...,) of the codes (K, C) nearest to vectors (..., C); the first of equally near ones."""
    rows = vectors.flatten(0, -2).split(max(1, _DISTANCES_AT_ONCE // len(codebook)))
    return torch.cat([distances(some, codebook).argmin(dim=1) for some in rows]).view(vectors.shape[:-1])


class ResidualQuantizer(nn.Module):
    """D codebooks, or one that all D levels share.

    Args:
        codebook_sizes: number of codes K_d at each level.
        code_dim: length C of a code vector.
        shared: whether all levels share one codebook.

    Raises:
        StudioError: a shared codebook of different sizes.
    """

    def __init__(self, codebook_sizes: tuple[int, ...], code_dim: int, shared: bool):
        super().__init__()
        if shared and len(set(codebook_sizes)) > 1:
            raise StudioError(f"A shared codebook has one size, not {list(codebook_sizes)}.")
        self.depth = len(codebook_sizes)
        sizes = codebook_sizes[:1] if shared else codebook_sizes
        self.codebooks = nn.ModuleList(nn.Embedding(size, code_dim) for size in sizes)
        self.codebooks.requires_grad_(False)

    @property
    def tables(self) -> list[torch.Tensor]:
        """Code vectors (K_d, C) of each level, coarse to fine; a shared codebook appears D times."""
        tables: list[torch.Tensor] = list(self.codebooks.parameters())
        return tables * self.depth if len(tables) == 1 else tables

    def encode(self, vectors: torch.Tensor, first: int | torch.Tensor = 0) -> torch.Tensor:
        """Codes (..., D) of vectors, computed in float32.

        Args:
            vectors: (..., C).
            first: the level to start at, one for all or (...,) for each vector; codes of the levels before are -1.
        """
        rest, codes = vectors.float(), []
        first = torch.as_tensor(first, device=vectors.device).expand(vectors.shape[:-1])
        for level, table in enumerate(self.tables):
            started = first <= level
            code = nearest(rest, table)
            rest = torch.where(started[..., None], rest - table[code].float(), rest)
            codes.append(torch.where(started, code, -1))
        return torch.stack(codes, dim=-1)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Code vectors (..., d, C) of the first d levels, for codes (..., d); that of -1 is the zero vector.

        Raises:
            StudioError: more levels than there are.
        """
        if codes.shape[-1] > self.depth:
            raise StudioError(f"The quantiser has {self.depth} levels; codes of {codes.shape[-1]} were given.")
        found = [F.embedding(code.clamp(min=0), table) for code, table in zip(codes.unbind(-1), self.tables)]
        return torch.stack(found, dim=-2).masked_fill((codes < 0)[..., None], 0)

    def forward(self, vectors: torch.Tensor) -> Quantized:
        """Quantises vectors (..., C) for training the network around it."""
        codes = self.encode(vectors.detach())
        return straight_through(vectors, self.lookup(codes), codes)
