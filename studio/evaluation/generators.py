"""How well a text-to-picture pipeline draws combinations that it has never seen."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from studio.data.archive import load_pictures
from studio.data.backgrounds import render
from studio.data.captions import full_caption
from studio.data.source import EMOJI, Source
from studio.errors import StudioError
from studio.evaluation.judge import draw_combinations, held_out_features, load_judge, scores, verdicts
from studio.evaluation.metrics import frechet_distance, psnr, sharpness, uniform_ssim
from studio.processes import gather, process_count, process_index

TRUTH_SIZE = 128


def evaluate_generator(
    pipe, samples=500, seed=0, batch_size=50, decoding=None, shared=False, source: Source | None = None
):
    """Draw held-out combinations from their full captions, and let the judge look.

    A source other than the emoji set is measured by `studio.evaluation.folders.evaluate_on_folder` instead.

    Args:
        pipe: a text-conditional pipeline; its own default guidance and sampling are used.
        samples: how many combinations, one picture each; more than the judge's features (64).
        seed: chooses the combinations, and seeds picture i with seed + i.
        batch_size: pictures drawn at a time; the result does not depend on it.
        decoding: how tokens are drawn, as of the pipeline.
        shared: whether all processes of `accelerate launch` call this, so that each draws a part of the batches; the
            result does not depend on it.

    Returns:
        `{"judge_top1", "judge_top5", "style_accuracy", "background_accuracy", "frechet", "resolution", "samples"}`:
        fractions, and the Frechet distance in the judge's features to the true pictures of all held-out combinations.
        A combination has exactly one true image: "truth_psnr", "truth_ssim" (7x7 windows) and "sharpness" compare with
        it, everything at 128 px, smaller images enlarged bicubically.
        A pipeline over rows of tokens also has "judge_top1_n" and "frechet_n", of pictures of the same draws' first n
        tokens, for some lengths n: the full one, halved up to four times.

    Raises:
        StudioError: too few samples, or more than there are combinations.
    """
    if source is not None and source.name != EMOJI:
        from studio.evaluation.folders import evaluate_on_folder

        return evaluate_on_folder(pipe, source, decoding=decoding)
    return judge_drawings(pipe, held_out_drawings(pipe, samples, seed, batch_size, decoding, shared))


@dataclass(frozen=True)
class Drawings:
    """Drawings of held-out combinations.

    Attributes:
        combinations: rows (n, 3) of concept, style and background.
        tokens: (n, ...) what was drawn, on the CPU.
        pictures: (n, 3, H, W) in [0, 1].
        shorter: those of the first tokens of a row, by their number.
    """

    combinations: np.ndarray
    tokens: torch.Tensor
    pictures: torch.Tensor
    shorter: dict[int, torch.Tensor]


def held_out_drawings(pipe, samples=500, seed=0, batch_size=50, decoding=None, shared=False, first_stream=None):
    """The `Drawings` that `evaluate_generator` judges; arguments and errors are its.

    With `first_stream`, picture i is seeded with that number plus i, in place of `seed`.
    """
    first_stream = seed if first_stream is None else first_stream
    judge = load_judge(device=pipe.device)
    if samples <= judge.config.feature_dim:
        raise StudioError(f"The Frechet distance needs more than {judge.config.feature_dim} samples, not {samples}.")
    drawn = draw_combinations(samples, np.random.default_rng(seed))
    captions = [full_caption(*row) for row in drawn.tolist()]
    first, every = (process_index(), process_count()) if shared else (0, 1)
    lengths = getattr(pipe.image_tokenizer, "lengths", [])[:-1]
    parts = {}
    for start in tqdm(range(first * batch_size, samples, every * batch_size), desc="drawing", unit="batch"):
        prompts = captions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(first_stream + start + i) for i in range(len(prompts))]
        drawing = pipe(prompts, generator=generators, decoding=decoding, output_type="pt")
        shorter = [pipe.decode_tokens(drawing.tokens[:, :length], "pt") for length in lengths]
        parts[start] = [part.cpu() for part in (drawing.tokens, drawing.images, *shorter)]
    drawings = sorted(gather(parts.items()) if shared else parts.items())
    tokens, pictures, *shorter = map(torch.cat, zip(*(part for _, part in drawings), strict=True))
    return Drawings(drawn, tokens, pictures, dict(zip(lengths, shorter, strict=True)))


def judge_drawings(pipe, drawings):
    """What the judge says of `Drawings`: the result of `evaluate_generator`."""
    judge = load_judge(device=pipe.device)
    true_features = held_out_features(judge)

    def measured(images):
        verdict = verdicts(judge, images)
        return {**scores(verdict, drawings.combinations), "frechet": frechet_distance(verdict.features, true_features)}

    of_lengths = {length: measured(images) for length, images in drawings.shorter.items()}
    return {
        **measured(drawings.pictures),
        **against_truth(drawings.pictures, drawings.combinations),
        "resolution": drawings.pictures.shape[-1],
        "samples": len(drawings.pictures),
        **{f"{name}_{length}": of[name] for length, of in of_lengths.items() for name in ("judge_top1", "frechet")},
    }


def against_truth(images: torch.Tensor, combinations: np.ndarray) -> dict[str, float]:
    """How close images (n, 3, H, W) in [0, 1] come to the true ones of their combinations (n, 3), at 128 px."""
    measured = {"truth_psnr": [], "truth_ssim": [], "sharpness": []}
    archive = load_pictures(TRUTH_SIZE)
    for start in range(0, len(images), 100):
        part = images[start : start + 100].float()
        if part.shape[-1] != TRUTH_SIZE:
            part = F.interpolate(part, size=(TRUTH_SIZE, TRUTH_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        truth = render(archive, combinations[start : start + 100])
        for name, metric in zip(measured, (psnr, uniform_ssim, sharpness)):
            measured[name].append(metric(part, truth))
    return {name: float(torch.cat(parts).mean()) for name, parts in measured.items()}
