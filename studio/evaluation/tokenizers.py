"""How well a visual tokenizer restores pictures of concepts it has never seen."""

import torch

from studio.data.archive import STYLES, load_pictures
from studio.data.backgrounds import PALETTE, compose
from studio.data.splits import concepts
from studio.evaluation.metrics import psnr, ssim
from studio.tokenizers.rvq import RVQTokenizer


@torch.inference_mode()
def evaluate_tokenizer(tokenizer, batch_size=64):
    """Restoration of every held-out concept in both styles on all ten backgrounds, at the tokenizer's own resolution.

    Returns:
        `{"psnr", "ssim", "bits_per_pixel", "resolution", "samples"}`: means of per-picture values in RGB [0, 1].
        A tokenizer of continuous tokens has "numbers_per_pixel" in place of the bits. One that restores from its first
        tokens also has "psnr_n" and "ssim_n" for some lengths n: the full one, halved up to four times; one of stacks
        of codes for every number n of levels below the full one.
    """
    resolution = tokenizer.config.sample_size
    device = next(tokenizer.parameters()).device
    dtype = next(tokenizer.parameters()).dtype
    pictures = load_pictures(resolution)[concepts(held_out=True)]
    cases = [
        (i, style, background)
        for i in range(len(pictures))
        for style in range(len(STYLES))
        for background in range(len(PALETTE))
    ]
    noise, likeness, tokens_per_image = [], [], 0
    shorter = {length: ([], []) for length in _shorter_lengths(tokenizer)}
    for start in range(0, len(cases), batch_size):
        index, style, background = map(list, zip(*cases[start : start + batch_size], strict=True))
        images = torch.from_numpy(compose(pictures[index, style], PALETTE[background])).to(device)
        tokens = tokenizer.encode((images * 2 - 1).to(dtype))
        tokens_per_image = tokens[0].numel()
        restored = (tokenizer.decode(tokens).float() / 2 + 0.5).clamp(0, 1)
        noise.append(psnr(restored, images))
        likeness.append(ssim(restored, images))
        for length in shorter:
            restored = (tokenizer.decode(tokens, length).float() / 2 + 0.5).clamp(0, 1)
            shorter[length][0].append(psnr(restored, images))
            shorter[length][1].append(ssim(restored, images))
    bits = getattr(tokenizer, "bits_per_token", None)
    size = {"numbers_per_pixel": tokens_per_image} if bits is None else {"bits_per_pixel": tokens_per_image * bits}
    return {
        "psnr": float(torch.cat(noise).mean()),
        "ssim": float(torch.cat(likeness).mean()),
        **{name: value / resolution**2 for name, value in size.items()},
        "resolution": resolution,
        "samples": len(cases),
        **{
            f"{measure}_{length}": float(torch.cat(values).mean())
            for length, both in shorter.items()
            for measure, values in zip(("psnr", "ssim"), both)
        },
    }


def _shorter_lengths(tokenizer):
    """The lengths or levels below the full ones at which a tokenizer is measured; none unless its first tokens are a
    picture."""
    if isinstance(tokenizer, RVQTokenizer):
        return range(1, tokenizer.config.depth)
    return list(getattr(tokenizer, "lengths", ()))[:-1]
