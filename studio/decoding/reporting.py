"""What loops share in which images of a batch advance by different lengths: what they cost, and what is reported."""

from dataclasses import dataclass
from typing import Protocol

import torch

from studio.decoding.autoregressive import Sampled
from studio.decoding.sampling import OnStep


@dataclass
class SpeculativeOutput(Sampled):
    """As of `Sampled`; `image_calls` counts images over all calls of the model, `image_tokens` the tokens of those."""

    image_calls: int = 0
    image_tokens: int = 0

    @property
    def mean_accepted_length(self) -> float:
        return self.image_tokens / self.image_calls


class Run(Protocol):
    """The images of one call: `tokens` (B, at least N), of which the first `lengths` of each image are final."""

    tokens: torch.Tensor
    lengths: list[int]

    def rewind(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths` tokens of each image, of which the last may have changed."""


class Reporter:
    """Tells `on_step` of tokens that all images have reached, and acts on what it changes.

    Args:
        on_step: called as (index, tokens (B, index + 1)); True stops the loop. None: nothing is reported.
        editable: whether it may write to the last of those tokens.
    """

    def __init__(self, run: Run, on_step: OnStep | None, editable: bool) -> None:
        self.run, self.on_step, self.reported = run, on_step, 0
        self.editable = editable and on_step is not None

    def stopped(self) -> bool:
        """Reports what is new; whether to stop."""
        run = self.run
        while self.on_step is not None and self.reported < min(run.lengths):
            index, self.reported = self.reported, self.reported + 1
            before = run.tokens[:, index].clone() if self.editable else None
            if self.on_step(index, run.tokens[:, : index + 1]):
                return True
            if before is not None:
                changed = run.tokens[:, index].ne(before).tolist()
                lengths = [index + 1 if is_new else length for is_new, length in zip(changed, run.lengths)]
                if lengths != run.lengths:
                    run.rewind(lengths)
        return False
