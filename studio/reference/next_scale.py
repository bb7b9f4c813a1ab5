"""The distribution that VAR's own sampler samples a token from (arXiv:2404.02905, the authors' code)."""

import torch

from studio.decoding.sampling import filter_logits


def scale_probabilities(logits: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """The distributions (..., V) of VAR's sampler: top-k first, then top-p counted from the least likely token."""
    kept = filter_logits(filter_logits(logits, top_k=top_k), top_p=top_p, order="lantern")
    return kept.softmax(dim=-1)
