"""DiSA: fewer denoising steps for tokens that are sampled later.

"DiSA: Diffusion Step Annealing in Autoregressive Image Generation" (arXiv:2505.20297). The more of an image is known,
the narrower is the distribution of the next tokens, and the fewer steps denoise them well.

As in the authors' code, models without a limit of their tokens never denoise from times above 950: the first steps of a
short schedule would multiply the network's error by thousands. Deviations: a single call of the transformer has the
first number of steps, where the authors divide by 0; a model with a limit (`GaussianDiffusion`) needs no such cut, and
gets none.
"""

import math

ANNEALINGS = ("linear", "cosine", "two-stage")
LATEST_TIME = 950


def annealed_steps(annealing: str, count: int, first: int, last: int) -> list[int]:
    """Denoising steps of the tokens of each of `count` calls, `first` at the first and `last` at the last one.

    Args:
        annealing: one of `ANNEALINGS`.
        count: calls of the transformer, at least 1.
        first, last: the bounds; `last` is at most `first`.
    """
    return [last + math.floor(_share(annealing, number, count) * (first - last)) for number in range(count)]


def _share(annealing: str, number: int, count: int) -> float:
    """How much of the range is left at a call, 1 to 0."""
    if count == 1:
        return 1.0
    if annealing == "linear":
        return (count - 1 - number) / (count - 1)
    if annealing == "cosine":
        return (1 + math.cos(math.pi * number / (count - 1))) / 2
    return 1.0 if number < (count - 1) / 2 else 0.0
