"""Evaluation of a text-to-image pipeline on held-out combinations of the emoji set."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from studio.checks import check_integer
from studio.data.archive import load_images
from studio.data.backgrounds import render
from studio.data.captions import full_caption
from studio.data.source import EMOJI, Source
from studio.errors import StudioError
from studio.evaluation.judge import held_out_features, judge_scores, load_judge, sample_combinations, scores
from studio.evaluation.metrics import frechet_distance, psnr, sharpness, uniform_ssim
from studio.pipelines.base import MAX_IMAGES
from studio.processes import gather, process_count, process_index

TRUTH_SIZE = 128


def evaluate_generator(
    pipe: Any,
    samples: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    decoding: object | None = None,
    shared: bool = False,
    source: Source | None = None,
) -> dict:
    """Sample held-out combinations from their full captions and classify the images with the judge.

    A source other than the emoji set is measured by `studio.evaluation.folders.evaluate_on_folder` instead.

    Args:
        pipe: a text-conditional pipeline; its own default guidance and sampling are used.
        samples: how many combinations, one image each; more than the judge's features (64).
        seed: chooses the combinations, and seeds image i with seed + i.
        batch_size: images sampled at a time; the result does not depend on it.
        decoding: how tokens are sampled, as of the pipeline.
        shared: whether all processes of `accelerate launch` call this, so that each samples a part of the batches; the
            result does not depend on it.

    Returns:
        `{"judge_top1", "judge_top5", "style_accuracy", "background_accuracy", "frechet", "resolution", "samples"}`:
        fractions, and the Frechet distance in the judge's features to the true images of all held-out combinations.
        A combination has exactly one true image: "truth_psnr", "truth_ssim" (7x7 windows) and "sharpness" compare with
        it, everything at 128 px, smaller images enlarged bicubically.
        A pipeline over rows of tokens also has "judge_top1_n" and "frechet_n", of images of the same samples' first n
        tokens, for some lengths n: the full one, halved up to four times.

    Raises:
        StudioError: too few samples, or more than there are combinations.
    """
    if source is not None and source.name != EMOJI:
        from studio.evaluation.folders import evaluate_on_folder

        return evaluate_on_folder(pipe, source, decoding=decoding)
    return judge_samples(pipe, held_out_samples(pipe, samples, seed, batch_size, decoding, shared))


@dataclass(frozen=True)
class Samples:
    """Samples of held-out combinations.

    Attributes:
        combinations: rows (n, 3) of concept, style and background.
        tokens: (n, ...) what was sampled, on the CPU.
        images: (n, 3, H, W) in [0, 1].
        shorter: those of the first tokens of a row, by their number.
    """

    combinations: np.ndarray
    tokens: torch.Tensor
    images: torch.Tensor
    shorter: dict[int, torch.Tensor]


def held_out_samples(
    pipe: Any,
    samples: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    decoding: object | None = None,
    shared: bool = False,
    first_stream: int | None = None,
) -> Samples:
    """The samples of `evaluate_generator`; arguments and errors as there.

    With `first_stream`, image i is seeded with that number plus i, in place of `seed`.
    """
    first_stream = seed if first_stream is None else first_stream
    samples, batch_size = check_integer("samples", samples, 1), check_integer("batch_size", batch_size, 1, MAX_IMAGES)
    judge = load_judge(device=pipe.device)
    if samples <= judge.config.feature_dim:
        raise StudioError(f"The Frechet distance needs more than {judge.config.feature_dim} samples, not {samples}.")
    sampled = sample_combinations(samples, np.random.default_rng(seed))
    captions = [full_caption(*row) for row in sampled.tolist()]
    first, every = (process_index(), process_count()) if shared else (0, 1)
    lengths = getattr(pipe.image_tokenizer, "lengths", [])[:-1]
    parts = {}
    for start in tqdm(range(first * batch_size, samples, every * batch_size), desc="sampling", unit="batch"):
        prompts = captions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(first_stream + start + i) for i in range(len(prompts))]
        sampling = pipe(prompts, generator=generators, decoding=decoding, output_type="pt")
        shorter = [pipe.decode_tokens(sampling.tokens[:, :length], "pt") for length in lengths]
        parts[start] = [part.cpu() for part in (sampling.tokens, sampling.images, *shorter)]
    outcomes = sorted(gather(parts.items()) if shared else parts.items())
    tokens, images, *shorter = map(torch.cat, zip(*(part for _, part in outcomes), strict=True))
    return Samples(sampled, tokens, images, dict(zip(lengths, shorter, strict=True)))


def judge_samples(pipe: Any, samples: Samples) -> dict:
    """The metrics of samples: the result of `evaluate_generator`."""
    judge = load_judge(device=pipe.device)
    true_features = held_out_features(judge)

    def measured(images):
        scored = judge_scores(judge, images)
        return {**scores(scored, samples.combinations), "frechet": frechet_distance(scored.features, true_features)}

    of_lengths = {length: measured(images) for length, images in samples.shorter.items()}
    return {
        **measured(samples.images),
        **against_truth(samples.images, samples.combinations),
        "resolution": samples.images.shape[-1],
        "samples": len(samples.images),
        **{f"{name}_{length}": of[name] for length, of in of_lengths.items() for name in ("judge_top1", "frechet")},
    }


def against_truth(images: torch.Tensor, combinations: np.ndarray) -> dict[str, float]:
    """Similarity of images (n, 3, H, W) in [0, 1] to the real ones of their combinations (n, 3), at 128 px."""
    measured: dict[str, list[torch.Tensor]] = {"truth_psnr": [], "truth_ssim": [], "sharpness": []}
    archive = load_images(TRUTH_SIZE)
    for start in range(0, len(images), 100):
        part = images[start : start + 100].float()
        if part.shape[-1] != TRUTH_SIZE:
            part = F.interpolate(part, size=(TRUTH_SIZE, TRUTH_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        truth = render(archive, combinations[start : start + 100])
        for name, metric in zip(measured, (psnr, uniform_ssim, sharpness)):
            measured[name].append(metric(part, truth))
    return {name: float(torch.cat(parts).mean()) for name, parts in measured.items()}
