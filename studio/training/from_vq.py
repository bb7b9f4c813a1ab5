"""Convolutional autoencoders that start from the encoder and the decoder of `emoji-vq`.

They have the same blocks under other names, so that what one bottleneck has taught them is not learned anew for the
next.
"""

import re
from collections.abc import Callable

import torch

from studio.checkpoints.loading import load

START = "emoji-vq"

_RVQ = (
    (r"\.conv_blocks\.(\d+)\.res\.", r".conv_blocks.\1.block."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)
_KL = (
    (r"\.conv_blocks\.(\d+)\.res\.", r".conv_blocks.\1.resnets."),
    (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.mid\.1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def rvq_name(name: str, levels: int) -> str:
    """The name in `RVQTokenizer`, whose decoder counts its levels from the picture, of a tensor of `VQTokenizer`."""
    name = re.sub(r"(?<=^decoder\.conv_blocks\.)\d+", lambda at: str(levels - 1 - int(at[0])), name)
    return _renamed(name, _RVQ)


def kl_name(name: str, levels: int) -> str:
    """The name in diffusers' `AutoencoderKL`, which has attention in its middle only, of a tensor of `VQTokenizer`."""
    return _renamed(name, _KL)


@torch.no_grad()
def start_from_vq(network: torch.nn.Module, new_name: Callable[[str, int], str]) -> int:
    """Copies the encoder and the decoder of `emoji-vq` into a network with both, as far as names and sizes agree.

    Returns:
        How many tensors of the network were found.
    """
    source = load(START, device="cpu")
    own, levels, found = network.state_dict(), len(source.config.channel_multipliers), 0
    for name, tensor in source.state_dict().items():
        target = own.get(new_name(name, levels)) if name.startswith(("encoder.", "decoder.")) else None
        if target is not None and target.numel() == tensor.numel():
            target.copy_(tensor.reshape(target.shape))
            found += 1
    return found


def _renamed(name, patterns):
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
