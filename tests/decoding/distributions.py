"""Exact distributions of tokens by enumeration: what `acceptance_probs` and `verify` imply, without a random number."""

import torch

from studio.decoding.sampling import filter_logits


def distribution_of_node(acceptance, tokens):
    """The distribution (V,) of the token that comes out at one node, in float64."""
    distribution, reached = torch.zeros_like(acceptance.residual[0], dtype=torch.float64), 1.0
    for token, ratio, tried in zip(tokens.tolist(), acceptance.ratios[0].tolist(), acceptance.tried[0].tolist()):
        if tried:
            passes = min(1.0, ratio)
            distribution[token] += reached * passes
            reached *= 1 - passes
    rest = acceptance.residual[0].double()
    return distribution + reached * rest / rest.sum()


def distance(distribution, p):
    """Total variation between two distributions."""
    return float((distribution.double() - p.double()).abs().sum() / 2)


def without_replacement(q, count):
    """All tuples of `count` tokens sampled from q (V,) without replacement, with their probabilities."""
    samples = [((), 1.0)]
    for _ in range(count):
        longer = []
        for sampled, probability in samples:
            left = sum(float(q[token]) for token in range(len(q)) if token not in sampled)
            for token in range(len(q)):
                if token not in sampled and float(q[token]) > 0:
                    longer.append(((*sampled, token), probability * float(q[token]) / left))
        samples = longer
    return samples


def scale_probabilities(logits, top_k=0, top_p=1.0):
    """The distributions (..., V) of VAR's sampler (arXiv:2404.02905): top-k, then top-p from the least likely token."""
    kept = filter_logits(filter_logits(logits, top_k=top_k), top_p=top_p, order="lantern")
    return kept.softmax(dim=-1)
