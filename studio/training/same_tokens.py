"""A tokenizer for larger images whose tokens stay those of a smaller one: generators over them give larger images.

The new decoder restores large images from the small tokenizer's tokens of the reduced images, which makes it a
super-resolution model too. The new encoder learns the vectors of the small one, so that tokens of a large image are
those of the reduced one.
"""

import re
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.training.from_vq import levels_of
from studio.training.generator import grid_of

OF_IMAGE = ("encoder.conv_in.", "decoder.norm_out.", "decoder.conv_norm_out.", "decoder.conv_out.")
"""Parts of a network that stand beside the pixels."""


class SameTokens(nn.Module):
    """A tokenizer that is trained for the tokens of another, which stays as it is.

    Args:
        tokenizer: for images whose sides are a multiple of the reference's; its grid has the reference's size.
        reference: the trained one.
    """

    def __init__(self, tokenizer: Any, reference: Any):
        super().__init__()
        self.tokenizer, self.reference = tokenizer, reference.requires_grad_(False)
        self.factor = tokenizer.config.sample_size // reference.config.sample_size

    def forward(self, images: torch.Tensor, **choices: torch.Tensor) -> torch.Tensor:
        """Loss of images (B, 3, H, W) in [-1, 1]: of what is restored from the reference's tokens, and of the encoder's
        vectors, over their variance.
        """
        with torch.no_grad():
            wanted, fed = self.tokens_of(F.avg_pool2d(images, self.factor), choices)
        distance = F.mse_loss(self.vectors(images).float(), wanted.float()) / wanted.float().var()
        return self.restoration(fed, images) + distance

    @abstractmethod
    def tokens_of(self, images: torch.Tensor, choices: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's vectors of reduced images, and what the decoder is fed; `choices` are those of the batch."""

    @abstractmethod
    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        """The vectors of the tokenizer that is trained."""

    @abstractmethod
    def restoration(self, fed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The loss of images that are restored from these tokens."""


def check_reference(reference: KLTokenizer | RVQTokenizer, size: int, grid: int) -> None:
    """Refuse sizes that another tokenizer's tokens cannot stand for; `StudioError`."""
    side, own = reference.config.sample_size, grid_of(reference)
    if own != grid or size <= side or size % side:
        raise StudioError(
            f"same_tokens_as names a tokenizer of {own}x{own} tokens for {side} px: take --grid {own} and a --size "
            f"that is a multiple of {side}, at least {2 * side}, not --grid {shown(grid)} and --size {shown(size)}."
        )


@torch.no_grad()
def start_coarse(network: nn.Module, reference: nn.Module) -> int:
    """Copies all of a network that is not beside the pixels into one with finer levels before and behind it.

    Names of both are those of `RVQTokenizer` or of diffusers' `AutoencoderKL`. Their coarsest levels are the same.

    Returns:
        How many tensors were found.
    """
    own, found = network.state_dict(), 0
    more = levels_of(network) - levels_of(reference)
    for name, weight in reference.state_dict().items():
        if name.startswith(OF_IMAGE):
            continue
        shifted = re.sub(
            r"^(encoder\.down|decoder\.up|encoder\.down_blocks)\.(\d+)\.",
            lambda match: f"{match[1]}.{int(match[2]) + more}.",
            name,
        )
        if shifted in own and own[shifted].shape == weight.shape:
            own[shifted].copy_(weight)
            found += 1
    return found
