"""Costs and gains of pruning in a vision-language model: seconds, tokens, memory and accuracy of every method.

The rows of `bench_reading` for people: a chart and a table.
"""

import statistics
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from studio.bench.chart import Series, chart
from studio.bench.models import check_counts
from studio.bench.report import markdown_table
from studio.checkpoints.loading import load
from studio.checks import check_choice, check_integer, check_number
from studio.data.scenes import draw_scene
from studio.errors import StudioError
from studio.evaluation.scenes import (
    KEEPS,
    MAX_SCENES,
    evaluate_compressed,
    evaluate_inside,
    evaluate_memory,
    evaluate_reader,
    interval,
)
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pruning.api import merge_tokens
from studio.pruning.merging import Counts, merging_from
from studio.pruning.registry import IN_CACHE, INSIDE, METHODS, method_named


def reading_chart(rows: list[dict]) -> str:
    """Exact answers over kept tokens, as SVG: a line for each method, which ends at the whole image."""
    whole = rows[0]
    series = [Series("all tokens", (_point(whole),))]
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        own = sorted(_point(row) for row in rows if row["method"] == method)
        series.append(Series(method, (*own, _point(whole))))
    title = "Exact answers about unseen scenes"
    return chart(title, "visual tokens that are read", "exact answers (%)", series, log_x=True)


def reading_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    head = ("Method", "Keep", "Tokens", *(f"{phase.capitalize()} ms" for phase in PHASES), "Further ms", "Speed-up")
    head += ("Cache KiB", "Exact %", "95 %", "Note")
    lines = []
    for row in rows:
        cells = [row["method"], f"{row['keep']:.3g}", f"{row['kept_tokens']} of {row['visual_tokens']}"]
        cells += [f"{1000 * row[phase]:.1f}" for phase in PHASES]
        cells += [f"{1000 * row['further']:.1f}", f"{row['speedup']:.2f}", f"{row['cache_bytes'] / 1024:.0f}"]
        cells += [f"{100 * row['accuracy']:.1f}", f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"]
        lines.append([*cells, _note(row)])
    return markdown_table(head, lines)


def _point(row):
    return row["kept_tokens"], 100 * row["accuracy"]


def _note(row):
    notes = [] if row["faster"] or row["method"] == "none" else ["not faster"]
    notes += ["not better than random"] if row["better_than_random"] is False else []
    return ", ".join(notes)


PHASES = ("encode", "select", "prefill", "decode")
CACHE = "kv-"
_MADE = "quecc"
_STREAM = 1_000_000_009
"""First number of the seeds of the images that are timed."""


def bench_reading(
    model: str = "emoji-vlm",
    *,
    methods: tuple[str, ...] | None = None,
    keeps: tuple[float, ...] = KEEPS,
    after_layer: int | None = None,
    merges: tuple[Counts | str, ...] = (),
    scenes: int = 100,
    images: int = 8,
    repeats: int = 3,
    tiles: tuple[int, int] = (2, 2),
    device: str | None = None,
) -> dict:
    """Time every method at every budget, and count exact answers.

    Args:
        model: `emoji-vlm`, or a folder that `studio train --preset emoji-vlm` made; for one of
            `studio train quecc` there are rows "quecc", one for each number of tokens.
        methods: names out of `METHODS` and `INSIDE`, or "kv-" before a method of `studio.compress`, whose
            image is read before the questions are known. `None` is all of `METHODS`, and "fastv", "divprune", "random"
            and "uniform" behind a layer.
        keeps: shares of the image's tokens, newlines included.
        after_layer: prune behind this layer of the language model (see `studio.prune`) instead of before it. Every
            question is then read on its own, twelve times the work. Methods of the cache do not heed it.
        merges: tokens that the vision tower merges, without pruning, as of `studio.pruning.merging.merging_from`: a
            row "tome ..." or "diffrate ..." for each.
        scenes: how many scenes, twelve questions each, the accuracy is counted over, as `studio evaluate` does.
        images: scenes that are timed, one question each; all settings get the same.
        repeats: runs of each image and setting, in turn with the others.
        tiles: rows and columns of tiles of each scene.

    Returns:
        `{"model", "device", "scenes", "questions", "rows"}`. The first row has method "none", keep 1.0. A row holds
        method, keep, visual_tokens, kept_tokens, the seconds `encode`, `select`, `prefill`, `decode` and their sum
        `total` (medians), `further` (the seconds of one more question about the same image), cache_bytes, accuracy, its
        95 % interval `low` and `high`, speedup (total of the first row over its own), faster (whether that is above
        1), and better_than_random (None for "none" and "random", or where random was left out).

    Raises:
        StudioError: a model that reads no scenes.
    """
    check_counts(images=images, repeats=repeats)
    keeps = tuple(check_number("keep", keep, 0, 1, above=True) for keep in keeps)
    scenes = check_integer("The number of scenes", scenes, 1, MAX_SCENES)
    if methods is None:
        methods = tuple(METHODS) if after_layer is None else ("fastv", "divprune", "random", "uniform")
    for name in methods:
        if name.startswith(CACHE):
            check_choice("The method of the cache", name, [CACHE + method for method in IN_CACHE])
        elif name not in INSIDE:
            method_named(name)
    own: dict[tuple[str, float], dict] = {(_name_of(each), 1.0): {"merge": each} for each in merges}
    pipe = load(model, device=device)
    if not isinstance(pipe, VisualQuestionPipeline) or pipe.model.config.model_type != "llava_next":
        raise StudioError(f"{model} is no LLaVA-NeXT that reads scenes: name emoji-vlm, or a folder of its training.")
    if (compressor := pipe.compressor) is not None:
        own |= {(_MADE, count / compressor.prompt_tokens): {"tokens": count} for count in compressor.config.tokens}
    settings = [("none", 1.0), *own]
    settings += [(method, keep) for method in methods for keep in keeps]
    answers = _answers(pipe, settings, {"after_layer": after_layer}, own, images, repeats, tiles)
    cached = tuple(method for method in methods if method.startswith(CACHE))
    inside = tuple(m for m in methods if m not in cached and (after_layer is not None or m in INSIDE))
    before = tuple(method for method in methods if method not in (*cached, *inside))
    where: dict[str, Any] = {"scenes": scenes, "tiles": tiles}
    measured = evaluate_reader(pipe.model, pipe.processor, methods=before, keeps=keeps, **where)
    shares: dict[tuple[str, float], float] = {}
    made = evaluate_compressed(pipe, **where)["accuracy"] if compressor is not None else {}
    for setting, call in own.items():
        if "tokens" in call:
            shares[setting] = made[str(call["tokens"])]
            continue
        with merge_tokens(pipe.model, **merging_from(call["merge"])):
            whole = evaluate_reader(pipe.model, pipe.processor, methods=(), keeps=(), **where)
        shares[setting] = whole["accuracy"]["none"]["1.0"]
    if inside:
        cuts = [(method, keep, after_layer) for method in inside for keep in keeps]
        found = evaluate_inside(pipe.model, pipe.processor, cuts, **where)
        shares |= {(method, keep): share for (method, keep, _), share in found.items()}
    if cached:
        kept = [(method.removeprefix(CACHE), keep) for method in cached for keep in keeps]
        shares |= {
            (CACHE + method, keep): share for (method, keep), share in evaluate_memory(pipe, kept, **where).items()
        }
    for (method, keep), share in shares.items():
        measured["accuracy"].setdefault(method, {})[str(keep)] = share
    rows = [_row(setting, answers[setting], measured["accuracy"]) for setting in settings]
    for row in rows:
        row["low"], row["high"] = interval(row["accuracy"], measured["questions"])
        row["speedup"] = rows[0]["total"] / row["total"]
        row["faster"] = row["speedup"] > 1
        by_chance = measured["accuracy"].get("random", {}).get(str(row["keep"]))
        comparable = row["method"] not in ("none", "random") and by_chance is not None
        row["better_than_random"] = row["accuracy"] > by_chance if comparable else None
    counts = {name: measured[name] for name in ("scenes", "questions")}
    return {"model": model, "device": pipe.device.type, **counts, "rows": rows}


def _name_of(merge: Counts | str) -> str:
    """The row of a merging tower; raises a `StudioError` for a text of another form."""
    method = merging_from(merge).get("method", "tome")
    numbers = merge.removeprefix(method) if isinstance(merge, str) else ",".join(map(str, np.atleast_1d(merge)))
    return f"{method} {numbers.removeprefix(':')}".rstrip()


def _answers(pipe, settings, cut, own, images, repeats, tiles):
    answers = {setting: [] for setting in settings}
    asked = [draw_scene(np.random.default_rng((_STREAM, number)), tiles, questions=1) for number in range(images)]
    _ask(pipe, asked[0], *settings[-1], cut, own)
    for _ in tqdm(range(repeats), desc="timing", unit="round"):
        for scene in asked:
            for setting in settings:
                answers[setting].append(_ask(pipe, scene, *setting, cut, own))
    return answers


def _ask(pipe, scene, method, keep, cut, own):
    if method.startswith(CACHE):
        memory = pipe.remember(Image.fromarray(scene.image), method=method.removeprefix(CACHE), keep=keep)
        answer = pipe.ask(memory, scene.questions[0].text, max_new_tokens=4)
        spent = {**answer.seconds, "encode": memory.seconds["remember"]}
        return replace(answer, seconds=spent, cache_bytes=memory.cache_bytes)
    chosen = {"prune": method, "keep": keep, **cut}
    if (method, keep) in own:
        chosen = own[method, keep]
    elif method == "none":
        chosen = {}
    return pipe(Image.fromarray(scene.image), scene.questions[0].text, **chosen, max_new_tokens=4)


def _row(setting, answers, accuracy):
    method, keep = setting
    cached = method.startswith(CACHE)
    seconds = {phase: statistics.median(answer.seconds[phase] for answer in answers) for phase in PHASES}
    return {
        "method": method,
        "keep": keep,
        "visual_tokens": answers[0].visual_tokens,
        "kept_tokens": answers[0].kept_tokens,
        **seconds,
        "total": statistics.median(sum(answer.seconds.values()) for answer in answers),
        "further": statistics.median(
            sum(spent for phase, spent in answer.seconds.items() if phase in ("prefill", "decode") or not cached)
            for answer in answers
        ),
        "cache_bytes": int(statistics.median(answer.cache_bytes for answer in answers)),
        "accuracy": accuracy[method][str(keep)],
    }
