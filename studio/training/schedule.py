"""The learning rate over a run."""


def learning_rate_factor(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero over the last `cooldown` fraction (arXiv:2405.18392).

    The fall does what an average of the weights would do, so none is kept.
    """
    falling = max(1.0, cooldown * steps)
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (steps - step) / falling))


class Rates:
    """The learning rates that optimizers start with, to be scaled together by a factor."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        self.bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def scale(self, factor: float) -> None:
        """Set every rate to `factor` times what it was."""
        for optimizer, bases in zip(self.optimizers, self.bases, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
