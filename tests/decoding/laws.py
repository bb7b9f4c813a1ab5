"""Exact laws of tokens by enumeration: what `weigh` and `verify` imply, without a random number."""

import torch


def law_of_node(weighed, tokens):
    """The law (V,) of the token that comes out at one node, in float64."""
    law, reached = torch.zeros_like(weighed.rest[0], dtype=torch.float64), 1.0
    for token, ratio, tried in zip(tokens.tolist(), weighed.ratios[0].tolist(), weighed.tried[0].tolist()):
        if tried:
            passes = min(1.0, ratio)
            law[token] += reached * passes
            reached *= 1 - passes
    rest = weighed.rest[0].double()
    return law + reached * rest / rest.sum()


def distance(law, p):
    """Total variation between two laws."""
    return float((law.double() - p.double()).abs().sum() / 2)


def without_replacement(q, count):
    """All tuples of `count` tokens drawn from q (V,) without replacement, with their probabilities."""
    draws = [((), 1.0)]
    for _ in range(count):
        longer = []
        for drawn, probability in draws:
            left = sum(float(q[token]) for token in range(len(q)) if token not in drawn)
            for token in range(len(q)):
                if token not in drawn and float(q[token]) > 0:
                    longer.append(((*drawn, token), probability * float(q[token]) / left))
        draws = longer
    return draws
