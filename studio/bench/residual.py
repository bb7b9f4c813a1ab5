"""What calls and levels buy: images of a ResGen over the number of calls and the levels that are decoded, judged."""

import time

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.bench.models import MOST_IMAGES, load_generator
from studio.bench.report import markdown_table
from studio.checks import check_integer
from studio.data.captions import full_caption
from studio.decoding.registry import decoding_named, decodings_for
from studio.evaluation.judge import held_out_features, judge_scores, load_judge, sample_combinations, scores
from studio.evaluation.metrics import frechet_distance
from studio.pipelines.resgen import ResGenPipeline

STEPS = (1, 2, 4, 8, 16, 32)


def bench_residual(
    model: str = "emoji-resgen",
    *,
    steps: tuple[int, ...] = STEPS,
    samples: int = 500,
    seed: int = 0,
    batch_size: int = 50,
    device: str | None = None,
) -> dict:
    """Samples the same held-out combinations with every number of calls, and decodes each sampling at every depth.

    Args:
        model: a folder or bundled name of a text-conditional `ResGenPipeline`.
        steps: numbers of calls.
        samples: combinations, one image each; more than the judge's features (64).
        seed: chooses the combinations, and seeds image i with seed + i.
        batch_size: images sampled at a time; the result does not depend on it.

    Returns:
        `{"model", "samples", "seed", "rows"}`. A row has "decoding", "steps", "depth" (the levels that are decoded),
        "judge_top1" as a fraction, "frechet" in the judge's features, and "seconds_per_image" of sampling all levels.

    Raises:
        StudioError: for another kind of model, and for more calls than an image has codes.
    """
    batch_size = check_integer("batch_size", batch_size, 1, MOST_IMAGES)
    pipe = load_generator(model, device, ResGenPipeline, "emoji-resgen")
    sampled = sample_combinations(samples, np.random.default_rng(seed))
    captions = [full_caption(*row) for row in sampled.tolist()]
    for number in steps:
        pipe.check_call(captions[0], decoding=decoding_named("resgen").settings(steps=number))
    judge = load_judge(device=pipe.device)
    truth, rows = held_out_features(judge), []
    settings = [(name, number) for name in decodings_for(type(pipe).__name__, ()) for number in steps]
    for name, number in tqdm(settings, desc="sampling", unit="setting"):
        began = time.perf_counter()
        tokens = _tokens(pipe, captions, decoding_named(name).settings(steps=number), seed, batch_size)
        seconds = (time.perf_counter() - began) / samples
        for depth in range(1, tokens.shape[2] + 1):
            images = torch.cat([_images(pipe, part, depth) for part in tokens.split(batch_size)])
            scored = judge_scores(judge, images)
            rows.append(
                {
                    "decoding": name,
                    "steps": number,
                    "depth": depth,
                    "judge_top1": scores(scored, sampled)["judge_top1"],
                    "frechet": frechet_distance(scored.features, truth),
                    "seconds_per_image": seconds,
                }
            )
    return {"model": str(model), "samples": samples, "seed": seed, "rows": rows}


def residual_table(rows: list[dict]) -> str:
    """The rows as a Markdown table: a line for a decoding and a number of calls, a column for a depth."""
    depths = sorted({row["depth"] for row in rows})
    head = ["Decoding", "Calls", "s an image", *(f"Top-1 % (Fréchet), depth {depth}" for depth in depths)]
    lines = []
    for name, number in dict.fromkeys((row["decoding"], row["steps"]) for row in rows):
        own = {row["depth"]: row for row in rows if (row["decoding"], row["steps"]) == (name, number)}
        cells = [f"{100 * own[depth]['judge_top1']:.1f} ({own[depth]['frechet']:.1f})" for depth in depths]
        lines.append([name, str(number), f"{own[depths[0]]['seconds_per_image']:.3f}", *cells])
    return markdown_table(head, lines)


def _images(pipe: ResGenPipeline, tokens: torch.Tensor, depth: int) -> torch.Tensor:
    """Images (n, 3, H, W) in [0, 1] of the first levels, on the CPU."""
    images = pipe.decode_tokens(tokens, "pt", depth)
    assert isinstance(images, torch.Tensor)
    return images.cpu()


def _tokens(pipe, captions, decoding, seed, batch_size):
    """Codes (n, L, D) of all captions."""
    parts = []
    for start in range(0, len(captions), batch_size):
        prompts = captions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(prompts))]
        parts.append(pipe(prompts, generator=generators, decoding=decoding, output_type="tokens").tokens)
    return torch.cat(parts)
