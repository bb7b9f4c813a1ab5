"""Reconstruction, speed and robustness of tokenizers on images of held-out concepts.

A tokenizer that decodes from a part of its tokens has a row for each of them: the depths of an `RVQTokenizer`, the
`lengths` of any tokenizer with that attribute. A continuous one has a row for itself, and rows for the tokens that
TokenBridge (arXiv:2503.16430) makes of it.
"""

import time
from dataclasses import asdict
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin

from studio.bench.models import MOST_IMAGES
from studio.checkpoints.bundled import bundled_names
from studio.checkpoints.loading import load
from studio.checks import check_integer
from studio.data.archive import RESOLUTION, STYLES, load_images
from studio.data.backgrounds import PALETTE, render
from studio.data.splits import concepts
from studio.errors import StudioError
from studio.evaluation.judge import judge_scores, load_judge
from studio.evaluation.metrics import frechet_distance, psnr, ssim
from studio.evaluation.robustness import GRID, Perturbation, is_perturbable, perturbed_frechet
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.token_bridge import TokenBridgeTokenizer

LEVELS = (8, 16, 32, 64)
"""Numbers of levels that TokenBridge's rows have."""


def bench_tokenizers(
    models: list[str] | None = None,
    *,
    samples: int = 200,
    seed: int = 0,
    grid: tuple[Perturbation, ...] = GRID,
    device: str | None = None,
    batch_size: int = 50,
) -> dict:
    """Measure tokenizers on the same held-out images, each at its own resolution.

    Args:
        models: bundled names, model folders or Hub ids; the bundled tokenizers when None.
        samples: images, more than the judge's features (64).
        seed: chooses the images, and which tokens go wrong.
        grid: how tokens go wrong; "robustness" is the mean over these.
        batch_size: images encoded and decoded at a time.

    Returns:
        `{"rows", "samples", "seed", "perturbations"}`. A row has "model" and "variant", "resolution", "tokens" and
        "bits" of an image, "psnr" in dB, "ssim", "frechet" in the judge's features, "robustness" (the same distance
        with wrong tokens) and "robustness_by_setting", "encode_per_second" and "decode_per_second" in images.
        Continuous tokens have no bits and no robustness: None.

    Raises:
        StudioError: a model that is no tokenizer, for a number of images that cannot be, or an empty grid.
    """
    if not grid:
        raise StudioError("Say how tokens go wrong at least once, as Perturbation(alpha, delta).")
    batch_size = check_integer("batch_size", batch_size, 1, MOST_IMAGES)
    sampled, judge, rows = _sample(samples, seed), load_judge(device=device), []
    for name in bundled_names("tokenizer") if models is None else models:
        tokenizer = load(name, device=device)
        if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
            raise StudioError(f"{name} is no tokenizer: {', '.join(bundled_names('tokenizer'))} are.")
        images = _images(sampled, tokenizer.config.sample_size)
        truth = judge_scores(judge, images).features
        for each, settings in variants(tokenizer):
            tokens, seconds = _encoded(each, images, batch_size)
            for variant, how in settings:
                restored, decoding = _decoded(each, tokens, how, batch_size)
                row = {"model": str(name), "variant": variant, "resolution": images.shape[-1]}
                row |= size_of(each, tokens, how)
                row["psnr"] = float(psnr(restored, images).mean())
                row["ssim"] = float(ssim(restored, images).mean())
                row["frechet"] = frechet_distance(judge_scores(judge, restored).features, truth)
                wrong = {"frechet": None, "by_setting": None}
                if is_perturbable(each):
                    wrong = perturbed_frechet(each, images, judge, grid, seed=seed, batch_size=batch_size, how=how)
                row["robustness"], row["robustness_by_setting"] = wrong["frechet"], wrong["by_setting"]
                row["encode_per_second"], row["decode_per_second"] = samples / seconds, samples / decoding
                rows.append(row)
    perturbations = [asdict(perturbation) for perturbation in grid]
    return {"rows": rows, "samples": samples, "seed": seed, "perturbations": perturbations}


def variants(tokenizer: ModelMixin) -> list[tuple]:
    """What is measured of a tokenizer: `(tokenizer, [(name of the row, keywords of decode)])` for each encoding."""
    whole: list[tuple[str, dict]] = [("", {})]
    if isinstance(tokenizer, KLTokenizer):
        bridges = [TokenBridgeTokenizer.from_autoencoder(tokenizer, levels=levels) for levels in LEVELS]
        return [(tokenizer, [("continuous", {})]), *((each, _named_levels(each)) for each in bridges)]
    if isinstance(tokenizer, TokenBridgeTokenizer):
        own = tokenizer.config.levels
        bridges = [tokenizer if levels == own else tokenizer.with_levels(levels) for levels in sorted({*LEVELS, own})]
        return [(each, _named_levels(each)) for each in bridges]
    if isinstance(tokenizer, RVQTokenizer):
        return [(tokenizer, [(f"depth {d}", {"depth": d}) for d in range(1, tokenizer.config.depth + 1)])]
    if lengths := getattr(tokenizer, "lengths", None):
        return [(tokenizer, [(f"length {n}", {"length": n}) for n in lengths])]
    return [(tokenizer, whole)]


def _named_levels(tokenizer):
    return [(f"{tokenizer.config.levels} levels", {})]


def _sample(samples, seed):
    """Rows (samples, 3) of concept, style and background, of concepts held out from tokenizers."""
    held_out = np.array([*product(concepts(held_out=True), range(len(STYLES)), range(len(PALETTE)))])
    if not 1 <= check_integer("The number of samples", samples) <= len(held_out):
        raise StudioError(f"There are {len(held_out)} held-out images; {samples} cannot be sampled.")
    return held_out[np.random.default_rng(seed).permutation(len(held_out))[:samples]]


def _images(sampled, resolution):
    """Images (n, 3, resolution, resolution) in [0, 1], enlarged where the archive's are smaller."""
    images = render(load_images(min(resolution, RESOLUTION)), sampled)
    if resolution > RESOLUTION:
        images = F.interpolate(images, size=(resolution, resolution), mode="bicubic").clamp(0, 1)
    return images


def size_of(tokenizer: ModelMixin, tokens: torch.Tensor, how: dict) -> dict:
    """Size of an image, or of the part of it that is decoded.

    Args:
        tokenizer: one that `studio.load` returns.
        tokens: (n, ...) of n images, as it encodes them.
        how: keywords of its `decode`: `{"length": n}`, `{"depth": d}` or `{}`.

    Returns:
        `{"tokens", "bits"}`; continuous tokens have no bits: None.
    """
    count = tokens[0].numel()
    if "depth" in how:
        cells = count // tokens.shape[-1]
        return {"tokens": cells * how["depth"], "bits": cells * tokenizer.bits_of_stack(how["depth"])}
    count = how.get("length", count)
    bits = getattr(tokenizer, "bits_per_token", None)
    return {"tokens": count, "bits": None if bits is None else count * bits}


@torch.inference_mode()
def _encoded(tokenizer, images, batch_size):
    """Tokens (n, ...) of images (n, 3, H, W) in [0, 1], on the CPU, and the seconds of it after a first batch."""
    parts = [(part * 2 - 1).to(tokenizer.device, tokenizer.dtype) for part in images.split(batch_size)]
    tokenizer.encode(parts[0]).cpu()
    began = time.perf_counter()
    tokens = [tokenizer.encode(part).cpu() for part in parts]
    return torch.cat(tokens), time.perf_counter() - began


@torch.inference_mode()
def _decoded(tokenizer, tokens, how, batch_size):
    """Images (n, 3, H, W) in [0, 1], on the CPU, and the seconds of it after a first batch."""
    parts = tokens.to(tokenizer.device).split(batch_size)
    tokenizer.decode(parts[0], **how).cpu()
    began = time.perf_counter()
    images = [tokenizer.decode(part, **how).cpu() for part in parts]
    seconds = time.perf_counter() - began
    return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1), seconds
