"""Tokens that an image has before sampling begins, as in in- and outpainting.

A masked model predicts any positions from any others. So sampling with known tokens is usual sampling that begins after
the known tokens, in an order that has them first: exact conditioning. A raster-order model conditions on the tokens
before a position only. There, known tokens are fed where they stand, and what stands before them does not know of them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KnownTokens:
    """Known tokens of B images.

    Args:
        tokens: (B, L), or (B, L, D) of stacks and vectors; at positions that are not known their values do not matter.
        mask: (B, L) bool, true at known positions; as many in each row, and not all.
    """

    tokens: torch.Tensor
    mask: torch.Tensor

    @property
    def unknown(self) -> int:
        """Positions of each image that are to be sampled."""
        return self.mask.shape[1] - int(self.mask[0].sum())

    @property
    def is_prefix(self) -> bool:
        """Whether no known position comes after an unknown one in raster order."""
        return not bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any())

    def known_last(self, order: torch.Tensor) -> torch.Tensor:
        """An order (B, L) whose last entries are sampled first, with the known positions moved to its end."""
        return order.gather(1, self.mask.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))

    def write(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) or (B, L, D) with the known ones in their places."""
        mask = self.mask if tokens.ndim == 2 else self.mask[..., None]
        return torch.where(mask, self.tokens, tokens)

    def fill(self, tokens: torch.Tensor, positions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Tokens (b, n) of positions (b, n) of some images (b,), with the known ones among them."""
        mask, known = self._at(positions, images)
        return torch.where(mask, known, tokens)

    def pin(self, logits: torch.Tensor, positions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Logits (b, n, V) of the tokens at positions (b, n) of some images (b,); known ones get probability 1."""
        mask, known = self._at(positions, images)
        certain = torch.full_like(logits, float("-inf")).scatter_(2, known[:, :, None], 0.0)
        return torch.where(mask[:, :, None], certain, logits)

    def _at(self, positions, images):
        positions = positions.clamp(0, self.mask.shape[1] - 1)
        return self.mask[images[:, None], positions], self.tokens[images[:, None], positions]
