"""Leakage of a background's colour onto the object, and its repair (Follow the Flow, arXiv:2504.01137).

Objects that the emoji set has in eight colours, each on backgrounds of the other seven. An object leaks where the judge
sees it in the background's colour. The judge chooses among the eight colours of the object; what it sees of that colour
on a gray background, which is none of the eight, is subtracted.
"""

from collections.abc import Sequence

import numpy as np
import torch

from studio.bench.models import load_generator
from studio.bench.report import records_table
from studio.checkpoints.bundled import bundled_names
from studio.data.archive import STYLES, load_concepts, load_images
from studio.data.backgrounds import NAMES, render
from studio.data.captions import article, full_caption
from studio.evaluation.judge import judge_scores, load_judge
from studio.pipelines.base import ConditionalPipeline
from studio.pipelines.item_states import isolated_items

KINDS = ("heart", "circle", "square")
COLOURS = ("white", "black", "red", "orange", "yellow", "green", "blue", "purple")
NEUTRAL = "gray"
_LABELS = {("white", "square"): "white large square", ("black", "square"): "black large square"}
TREATMENTS = ("none", "repaired")


def bench_leakage(
    models: Sequence[str] | None = None, *, seed: int = 0, batch_size: int = 48, device: str | None = None
) -> dict:
    """Samples every object on every background, with the text states as they are and repaired.

    Args:
        models: text-conditional pipelines over the emoji set; the bundled ones when None.
        seed: of the first image; image i has `seed` + i.
        batch_size: images sampled at a time.

    Returns:
        `{"rows", "colours"}`. A row has "model", "regions" (of its region conditioning, a side; 0 for none), "states"
        ("none" or "repaired"; of true images None), "n", "own" (share of objects in their own colour), "background"
        (in the background's), "neutral" (the same on a gray background), "leakage" (the difference) and "matrix":
        shares of "background" by colour of the object and of the background, None where they are the same.

    Raises:
        StudioError: for another kind of model.
    """
    judge = load_judge(device=device)
    cases = leakage_cases()
    size = judge.config.sample_size
    rows = [_row("true images", None, None, judge, render(load_images(size), cases), cases)]
    for name in bundled_names("pipeline") if models is None else models:
        pipe = load_generator(name, device, ConditionalPipeline)
        for treatment in TREATMENTS:
            images = _sampled(pipe, cases, treatment, seed, batch_size)
            regions = pipe.transformer.config.get("plan_size", 0)
            rows.append(_row(str(name), regions, treatment, judge, images, cases))
    return {"rows": rows, "colours": list(COLOURS)}


def leakage_cases() -> np.ndarray:
    """Rows (n, 3) of concept, style and background: all kinds, colours and styles, on the colours and on gray."""
    grounds = [NAMES.index(colour) for colour in (*COLOURS, NEUTRAL)]
    found = [
        (concept, style, ground)
        for own, family in zip(COLOURS, zip(*families()))
        for concept in family
        for style in range(len(STYLES))
        for ground in grounds
        if NAMES[ground] != own
    ]
    return np.array(found)


def families() -> list[list[int]]:
    """The concepts of each kind, in the order of `COLOURS`."""
    labels = {concept.label: concept.index for concept in load_concepts()}
    return [[labels[_LABELS.get((colour, kind), f"{colour} {kind}")] for colour in COLOURS] for kind in KINDS]


def leakage_tables(result: dict) -> str:
    """The rows, and the colours of objects and backgrounds of the first model, as Markdown tables."""
    shown = [{name: value for name, value in row.items() if name != "matrix"} for row in result["rows"]]
    first = next((row for row in result["rows"] if row["states"] == "none"), result["rows"][0])
    matrix = [
        {"object": colour, **{f"on {ground}": share for ground, share in zip(result["colours"], shares)}}
        for colour, shares in zip(result["colours"], first["matrix"])
    ]
    return (
        f"{records_table(shown)}\n\nObjects of {first['model']} in the background's colour:\n\n{records_table(matrix)}"
    )


def _sampled(pipe, cases, treatment, seed, batch_size):
    """Images (n, 3, H, W) in [0, 1] of cases."""
    labels, parts = [concept.label for concept in load_concepts()], []
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        prompts = [full_caption(*row) for row in batch.tolist()]
        call = {
            "generator": [torch.Generator().manual_seed(seed + start + number) for number in range(len(batch))],
            "output_type": "pt",
        }
        if treatment == "none":
            parts.append(pipe(prompts, **call).images.cpu())
            continue
        items = sorted({article(labels[concept]) for concept in batch[:, 0]})
        with isolated_items(pipe, *items):
            parts.append(pipe(prompts, **call).images.cpu())
    return torch.cat(parts)


def _row(model, regions, treatment, judge, images, cases):
    families_ = np.array(families())
    logits = judge_scores(judge, images).concepts.numpy()
    kinds, colours = zip(*(np.argwhere(families_ == concept)[0] for concept in cases[:, 0]))
    kinds, colours = np.array(kinds), np.array(colours)
    seen = np.take_along_axis(logits, families_[kinds], axis=1).argmax(axis=1)
    grounds = np.array([COLOURS.index(NAMES[row]) if NAMES[row] in COLOURS else -1 for row in cases[:, 2]])
    on_colour = grounds >= 0
    shares = [
        [
            None if own == ground else float((seen == ground)[(colours == own) & (grounds == ground)].mean())
            for ground in range(len(COLOURS))
        ]
        for own in range(len(COLOURS))
    ]
    neutral = [
        float((seen == ground)[(colours == own) & ~on_colour].mean())
        for own in range(len(COLOURS))
        for ground in range(len(COLOURS))
        if own != ground
    ]
    background = float((seen == grounds)[on_colour].mean())
    return {
        "model": model,
        "regions": regions,
        "states": treatment,
        "n": int(on_colour.sum()),
        "own": float((seen == colours)[on_colour].mean()),
        "background": background,
        "neutral": float(np.mean(neutral)),
        "leakage": background - float(np.mean(neutral)),
        "matrix": shares,
    }
