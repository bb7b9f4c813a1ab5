"""Constant and rising guidance of generators at the same mean scale (ELM, arXiv:2410.16257)."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from studio.bench.models import load_generator
from studio.checkpoints.bundled import bundled_names
from studio.decoding.autoregressive import SCHEDULES
from studio.decoding.mar import MaskedSteps
from studio.decoding.registry import decoding_named, decodings_for
from studio.decoding.resgen import ResidualSteps
from studio.errors import StudioError
from studio.evaluation.generators import held_out_samples, judge_samples
from studio.pipelines.base import ConditionalPipeline

SCALES = (2.0, 3.0)


def bench_guidance(
    models: Sequence[str] | None = None,
    *,
    scales: Sequence[float] = SCALES,
    samples: int = 500,
    seed: int = 0,
    device: str | None = None,
) -> dict:
    """Sample held-out combinations with every schedule.

    Args:
        models: text-conditional pipelines over the emoji set; the bundled ones when None.
        scales: mean scales over the tokens of an image, above 1.
        samples, seed: as of `evaluate_generator`.

    Returns:
        `{"samples", "seed", "rows"}`. A row has "model", "mean_scale", "schedule", "scale" (what the pipeline gets),
        "judge_top1", "style_accuracy", "background_accuracy", "frechet" and "truth_psnr".

    Raises:
        StudioError: for another kind of model, and for scales without guidance.
    """
    if not all(scale > 1 for scale in scales):
        raise StudioError("A mean scale of 1 is no guidance: give numbers above 1.")
    rows = []
    for name in bundled_names("pipeline") if models is None else models:
        pipe = load_generator(name, device, ConditionalPipeline)
        plain = decoding_named(decodings_for(type(pipe).__name__, ())[0])
        for mean, schedule in tqdm([*product(scales, SCHEDULES)], desc=str(name), unit="setting"):
            decoding = plain.settings(guidance_schedule=schedule)
            scale = scale_of_mean(pipe, decoding, mean)
            measured = judge_samples(pipe, _samples(pipe, scale, samples, seed, decoding))
            kept = ("judge_top1", "style_accuracy", "background_accuracy", "frechet", "truth_psnr")
            row = {"model": str(name), "mean_scale": mean, "schedule": schedule, "scale": scale}
            rows.append(row | {key: measured[key] for key in kept})
    return {"samples": samples, "seed": seed, "rows": rows}


def scale_of_mean(pipe: ConditionalPipeline, decoding: Any, mean: float) -> float:
    """The greatest scale with which the tokens of an image are guided by `mean` on average."""
    if decoding.guidance_schedule == "constant":
        return mean
    return 1 + (mean - 1) / mean_share(pipe, decoding)


def mean_share(pipe: ConditionalPipeline, decoding: Any) -> float:
    """What linear guidance multiplies `scale - 1` by, on average over the tokens of an image."""
    total = pipe.transformer.num_tokens
    if isinstance(decoding, MaskedSteps):
        plan = decoding.filled(steps=pipe.config.default_num_inference_steps).plan(total)
        return sum((step.last - step.first) * step.progress for step in plan) / total
    if isinstance(decoding, ResidualSteps):
        settings = decoding.filled(steps=pipe.config.default_num_inference_steps)
        total *= pipe.transformer.config.depth
        left = [total, *settings.plan(total)]
        shown = [before - after for before, after in zip(left, left[1:])]
        return sum(count * step for step, count in enumerate(shown)) / max(1, len(shown) - 1) / total
    return (total + 1) / (2 * total)


def _samples(pipe, scale, samples, seed, decoding):
    """The samples of held-out combinations, guided by this scale."""
    own = pipe.config.default_guidance_scale
    pipe.register_to_config(default_guidance_scale=scale)
    try:
        return held_out_samples(pipe, samples, seed, decoding=decoding)
    finally:
        pipe.register_to_config(default_guidance_scale=own)
