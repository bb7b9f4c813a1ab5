"""The learning rate over a run."""

import torch


def learning_rate_factor(step: int, share: float, warmup: int, cooldown: float) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last part of a run (arXiv:2405.18392).

    Args:
        step: optimiser steps done.
        share: of the run that is done, from 0 to 1.
        warmup: steps until the peak.
        cooldown: share of the run over which the rate falls.
    """
    falling = (1 - share) / cooldown if cooldown else 1.0
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, falling))


class Rates:
    """The learning rates that optimizers start with, to be scaled together by a factor."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def scale(self, factor: float) -> None:
        """Set every rate to `factor` times what it was."""
        for optimizer, bases in zip(self.optimizers, self.bases, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
