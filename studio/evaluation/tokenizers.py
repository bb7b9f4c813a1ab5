"""Evaluation of an image tokenizer on held-out images."""

from typing import Any

import torch

from studio.data.emoji import EmojiSource
from studio.data.source import Source
from studio.evaluation.metrics import psnr, ssim
from studio.tokenizers.rvq import RVQTokenizer


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: Any, source: Source | None = None, batch_size: int = 64) -> dict:
    """Reconstruction of held-out images, at the tokenizer's own resolution.

    Args:
        tokenizer: any image tokenizer.
        source: the data; `None` for the emoji set, of which every concept held out for tokenizers is measured in both
            styles on all ten backgrounds.
        batch_size: images at a time.

    Returns:
        `{"psnr", "ssim", "bits_per_pixel", "resolution", "samples"}`: means of per-image values in RGB [0, 1].
        A tokenizer of continuous tokens has "numbers_per_pixel" in place of the bits. One that restores from its first
        tokens also has "psnr_n" and "ssim_n" for some lengths n: the full one, halved up to four times; one of stacks
        of codes for every number n of levels below the full one.
    """
    resolution = tokenizer.config.sample_size
    examples = (source or EmojiSource(resolution)).unseen
    device = next(tokenizer.parameters()).device
    dtype = next(tokenizer.parameters()).dtype
    noise, similarity, tokens_per_image = [], [], 0
    shorter: dict[int, tuple[list, list]] = {length: ([], []) for length in _shorter_lengths(tokenizer)}
    for start in range(0, len(examples), batch_size):
        images = examples.images(range(start, min(start + batch_size, len(examples)))).to(device)
        tokens = tokenizer.encode(images.to(dtype))
        images = images / 2 + 0.5
        tokens_per_image = tokens[0].numel()
        restored = (tokenizer.decode(tokens).float() / 2 + 0.5).clamp(0, 1)
        noise.append(psnr(restored, images))
        similarity.append(ssim(restored, images))
        for length in shorter:
            restored = (tokenizer.decode(tokens, length).float() / 2 + 0.5).clamp(0, 1)
            shorter[length][0].append(psnr(restored, images))
            shorter[length][1].append(ssim(restored, images))
    bits = getattr(tokenizer, "bits_per_token", None)
    size = {"numbers_per_pixel": tokens_per_image} if bits is None else {"bits_per_pixel": tokens_per_image * bits}
    return {
        "psnr": float(torch.cat(noise).mean()),
        "ssim": float(torch.cat(similarity).mean()),
        **{name: value / resolution**2 for name, value in size.items()},
        "resolution": resolution,
        "samples": len(examples),
        **{
            f"{measure}_{length}": float(torch.cat(values).mean())
            for length, both in shorter.items()
            for measure, values in zip(("psnr", "ssim"), both)
        },
    }


def _shorter_lengths(tokenizer):
    """The lengths or levels below the full ones at which a tokenizer is measured; none unless its first tokens are a
    image.
    """
    if isinstance(tokenizer, RVQTokenizer):
        return range(1, tokenizer.config.depth)
    return list(getattr(tokenizer, "lengths", ()))[:-1]
