"""Convolutional autoencoders that start from the encoder and the decoder of a trained `VQTokenizer`.

They have the same blocks under other names, so that what one bottleneck has taught them is not learned anew for the
next.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.loading import class_of
from studio.checkpoints.mar import kl_name, kl_weight
from studio.checkpoints.official import renamed
from studio.tokenizers.vq import VQTokenizer

_RVQ = (
    (r"\.conv_blocks\.(\d+)\.res\.", r".conv_blocks.\1.block."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)


def is_vq(folder: Path) -> bool:
    """Whether a folder holds a `VQTokenizer`."""
    return class_of(folder) == VQTokenizer.__name__


@torch.no_grad()
def start_rvq(network: torch.nn.Module, folder: Path) -> int:
    """Copies the encoder and the decoder of a `VQTokenizer` into an `RVQTokenizer`, as far as names and sizes agree.

    Returns:
        How many tensors of the network were found.
    """
    return _fill(network, folder, lambda name, weight, levels: (rvq_name(name, levels), weight))


@torch.no_grad()
def start_kl(network: torch.nn.Module, folder: Path) -> int:
    """The same for diffusers' `AutoencoderKL`, which has attention in its middle only."""
    all_levels = levels_of(network)

    def of_diffusers(name, weight, levels):
        name = rvq_name(name, levels)
        return kl_name(name, all_levels), kl_weight(name, weight)

    return _fill(network, folder, of_diffusers)


def rvq_name(name: str, levels: int) -> str:
    """The name in `RVQTokenizer`, whose decoder counts its levels from the image, of a tensor of `VQTokenizer`."""
    name = re.sub(r"(?<=^decoder\.conv_blocks\.)\d+", lambda at: str(levels - 1 - int(at[0])), name)
    return renamed(name, _RVQ)


def levels_of(network: torch.nn.Module) -> int:
    """Levels of an encoder."""
    encoder: Any = network.get_submodule("encoder")
    return len(encoder.down if hasattr(encoder, "down") else encoder.down_blocks)


def _fill(network, folder, converted: Callable[[str, torch.Tensor, int], tuple[str, torch.Tensor]]) -> int:
    source = VQTokenizer.from_pretrained(folder, dtype=torch.float32)
    own, levels, found = network.state_dict(), len(source.config.channel_multipliers), 0
    for name, weight in source.state_dict().items():
        name, weight = converted(name, weight, levels)
        if name.startswith(("encoder.", "decoder.")) and name in own and own[name].shape == weight.shape:
            own[name].copy_(weight)
            found += 1
    return found
