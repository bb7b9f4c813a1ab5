"""Classifier-free guidance (arXiv:2207.12598) when the tokens of one call stand at different places of the picture."""

from dataclasses import dataclass

import torch

from studio.decoding.autoregressive import guided_logits


@dataclass
class Guidance:
    """Scale and interval as of `autoregressive`; `streams` is 2 while null rows follow the conditional ones, else 1."""

    scale: float
    interval: int
    streams: int

    def combine(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Logits (B, n, V) out of those of all rows (B or 2B, n, V); `index` (B, n) is of the token they predict."""
        if self.streams == 1:
            return logits
        guided = guided_logits(logits, self.scale)
        if self.interval < 0:
            return guided
        inside = (index == 0) | (index - 1 <= self.interval)
        return torch.where(inside[:, :, None], guided, logits[: len(guided)])

    def rows(self, per_picture: torch.Tensor) -> torch.Tensor:
        """What belongs to pictures (B, ...), for all rows."""
        return torch.cat((per_picture, per_picture)) if self.streams == 2 else per_picture

    def is_over(self, length: int) -> bool:
        """Whether no token behind the first `length` is guided, though null rows are still there."""
        return self.streams == 2 and 0 <= self.interval < length - 1
