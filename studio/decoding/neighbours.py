"""Which codes are close to each other: the latent neighbourhoods of LANTERN (arXiv:2410.03355, section 4).

Row x of a table lists all other codes by rising Euclidean distance, x itself left out, and holds the k columns that are
ever read. Deviation from the authors' code: distances are taken between unit vectors, because those are what LlamaGen's
image decoder looks up; `normalise=False` takes the stored vectors as they are.
"""

import hashlib
from collections import OrderedDict

import torch
import torch.nn.functional as F

from studio.errors import StudioError

_BLOCK = 512
_KEPT_TABLES = 4
_tables: "OrderedDict[tuple, torch.Tensor]" = OrderedDict()


def neighbour_table(codebook: torch.Tensor, k: int, normalise: bool = True) -> torch.Tensor:
    """The k nearest other codes (V, k), int32, of each code of a codebook (V, C); the last few tables are kept.

    Errors: `StudioError` unless k is from 1 to V - 1.
    """
    vocab = len(codebook)
    if not 1 <= k < vocab:
        raise StudioError(f"A codebook of {vocab} codes has neighbourhoods of 1 to {vocab - 1} codes, not {k}.")
    vectors = codebook.detach().float()
    digest = hashlib.sha256(vectors.cpu().contiguous().numpy().tobytes()).hexdigest()
    key = (digest, vectors.shape, k, normalise, vectors.device)
    if key not in _tables:
        _tables[key] = _nearest(F.normalize(vectors, dim=-1) if normalise else vectors, k)
        while len(_tables) > _KEPT_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _nearest(vectors: torch.Tensor, k: int) -> torch.Tensor:
    table = torch.empty(len(vectors), k, dtype=torch.int32, device=vectors.device)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        distances = torch.cdist(block, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(block), device=vectors.device)
        distances[own, start + own] = float("inf")
        table[start : start + _BLOCK] = distances.topk(k, dim=1, largest=False, sorted=True).indices
    return table
