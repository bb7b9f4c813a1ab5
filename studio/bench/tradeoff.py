"""What each decoding of a pipeline costs and gains: seconds for an image and quality, same prompts and seeds for all.

The rows of `bench_tradeoff` for people: a chart and a table.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.bench.chart import Series, chart
from studio.bench.cost import call_seconds, peak_flops
from studio.bench.decoding import read_bandwidth, step_weights
from studio.bench.models import check_counts, load_generator
from studio.bench.report import markdown_table
from studio.checkpoints.measured import fingerprint, save_measured
from studio.checks import check_integer, shown
from studio.data.captions import full_caption
from studio.decoding.jacobi import Jacobi
from studio.decoding.registry import DECODINGS, decoding_named, decodings_for, is_approximate
from studio.errors import StudioError
from studio.evaluation.generators import held_out_samples, judge_samples
from studio.evaluation.judge import sample_combinations
from studio.evaluation.metrics import sliced_distance
from studio.pipelines.base import ConditionalPipeline
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.pipelines.mar import MARPipeline

_EXTRA = {
    "verify_ratio": "Verify",
    "draft_ratio": "Draft",
    "break_even_length": "Break-even",
    "truth_psnr": "PSNR",
    "acceptance": "Kept drafts",
    "latent_distance": "Latents off by",
}
"""What only some rows have, and what it is called; a column is left out where no row has it."""
_FINE = ("latent_distance",)


def tradeoff_chart(rows: list[dict], batch: int = 1) -> str:
    """Judge's top-1 over images a second, as SVG; one series a decoding, of the rows with one batch size."""
    chosen = [row for row in rows if row["batch"] == batch]
    names = list(dict.fromkeys(row["decoding"] for row in chosen))
    series = []
    for name in names:
        own = [row for row in chosen if row["decoding"] == name]
        points = tuple((1 / row["seconds_per_image"], 100 * row["judge_top1"]) for row in own)
        series.append(Series(name, points, tuple(_setting(row) for row in own)))
    title = f"Quality over speed, {batch} at a time"
    return chart(title, "images a second", "judge top-1 (%)", series, log_x=True, least_height=10)


def tradeoff_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    head: tuple[str, ...] = (
        "Decoding",
        "Settings",
        "Batch",
        "s an image",
        "Speed-up",
        "Calls",
        "Accepted",
        "Top-1 %",
        "Fréchet",
    )
    extra = {name: label for name, label in _EXTRA.items() if any(name in row for row in rows)}
    head += tuple(extra.values())
    lines = []
    for row in rows:
        cells = [row["decoding"], _setting(row) or "–", str(row["batch"]), f"{row['seconds_per_image']:.3f}"]
        cells += [f"{row['speedup']:.2f}", f"{row['target_calls']:.1f}", f"{row['mean_accepted_length']:.2f}"]
        cells += [f"{100 * row['judge_top1']:.1f}", f"{row['frechet']:.1f}"]
        cells += [f"{row[name]:.{2 + (name in _FINE)}f}" if name in row else "–" for name in extra]
        lines.append(cells)
    return markdown_table(head, lines)


def _setting(row):
    short = {"delta": "δ", "ratio": "ratio", "steps": "steps", "teacher_steps": "teacher", "prefill": "prefill"}
    short |= {"draft_steps": "drafts", "inner_temperature": "inner T", "diffusion_steps": "T", "order": "order"}
    short |= {"annealing": "annealing", "last_diffusion_steps": "to", "cache": "cache", "refresh_every": "every"}
    short |= {"warm_steps": "warm", "coupling": "coupling"}
    settings = {short[name]: value for name, value in row["settings"].items() if name in short and value}
    parts = [f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in settings.items()]
    if drafts := row["settings"].get("drafts"):
        parts.append(f"over {'the drafter' if drafts == 'own' else drafts}")
    if mode := row["settings"].get("mode"):
        parts.append(mode)
    if row.get("approximate"):
        parts.append("(approximate)")
    return " ".join(parts)


COMMITTED = Path(__file__).with_name("decodings")
"""The printed documents of full runs, one for a bundled model; `quick` takes their quality."""
PICTURES = 16
QUALITY_SAMPLES = 500
_QUALITY = ("judge_top1", "frechet", "truth_psnr", "quality_samples")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A decoding by the name and the options that `studio generate` takes."""

    decoding: str
    settings: dict = dataclasses.field(default_factory=dict)

    def make(self) -> Any:
        """What `decoding=` of a pipeline takes."""
        return decoding_named(self.decoding).settings(**self.settings)


def contenders(pipe: ConditionalPipeline) -> list[Contender]:
    """Plain decoding, and every decoding that the pipeline has the parts for, at the settings of the registry."""
    components = [name for name, part in pipe.components.items() if part is not None]
    names = decodings_for(type(pipe).__name__, components)
    total = pipe.transformer.num_tokens
    return [Contender(name, dict(options)) for name in names for options in decoding_named(name).benchmarked(total)]


def bench_tradeoff(
    model: str = "emoji-ar",
    *,
    only: tuple[str, ...] = (),
    quick: bool = False,
    save: bool = False,
    batch_sizes: tuple[int, ...] = (1, 8),
    dtypes: tuple[str, ...] = ("float32",),
    device: str | None = None,
    repeats: int = 3,
    images: int = PICTURES,
    quality_samples: int = QUALITY_SAMPLES,
) -> dict:
    """Time every decoding and judge what it samples.

    Args:
        model: a text-conditional pipeline over the emoji set, by bundled name or folder.
        only: names of decodings to time beside plain decoding; all when empty.
        quick: take the quality from the committed full run, instead of sampling `quality_samples` images a setting.
        save: keep the rows for `--decoding auto` on this machine.
        batch_sizes: images sampled at a time, at most `images`.
        repeats: runs of every setting, in turn with the others; the median counts.
        images: images a run, of held-out combinations.
        quality_samples: images a setting for the judge.

    Returns:
        `{"model", "fingerprint", "device", "left_out", "rows"}`. A row holds decoding, settings, batch, dtype,
        seconds_per_image (image decoding included), speedup against the first row of the same batch and dtype, which
        is plain decoding, target_calls for an image, mean_accepted_length, judge_top1, frechet, truth_psnr (dB, of
        `against_truth`) and quality_samples;
        over continuous tokens also latent_distance, the `sliced_distance` of a cell's numbers from plain decoding's
        with other seeds, and with a drafter acceptance, the share of drafts that were kept; with drafts nodes (tokens
        that a call reads for an image), verify_ratio (a call with all nodes over a plain step), draft_ratio (all else
        in a round, drafts and tests, over a plain step), break_even_length (their sum: what must be accepted to gain),
        and for every row but a student's memory_bound_seconds and compute_bound_seconds for an image.

    Raises:
        StudioError: for another kind of model, for a name in `only` that it has no decoding of, and in a quick run when
            the committed quality is of other weights or lacks a setting.
    """
    check_counts(repeats=repeats, images=images)
    batch_sizes = tuple(check_integer("batch", batch, 1, images) for batch in batch_sizes)
    mark = fingerprint(model)
    committed = _committed_quality(model, mark) if quick else None
    rows = []
    for dtype in dtypes:
        pipe = load_generator(model, device, ConditionalPipeline, dtype=dtype)
        field = _chosen(contenders(pipe), only)
        name = str(pipe.transformer.dtype).removeprefix("torch.")
        quality = []
        if committed is None:
            plain = _plain_cells(pipe, field[0], quality_samples) if isinstance(pipe, MARPipeline) else None
            judged = {}
            for each in field:
                same = _judged_as(each, name)
                key = _key(same.decoding, same.settings, name)
                if key not in judged:
                    judged[key] = _quality(pipe, same, quality_samples, plain)
                quality.append(judged[key])
        else:
            quality = [_looked_up(committed, _judged_as(each, name), name) for each in field]
        machine = _Machine(pipe.transformer) if isinstance(pipe, LlamaGenPipeline) else None
        for batch in batch_sizes:
            timed = _timed(pipe, field, batch, repeats, images)
            base = timed[0]
            for contender, run, judged in zip(field, timed, quality):
                rows.append(_row(contender, batch, name, run, base, judged, machine))
    result: dict[str, Any] = {
        "model": model,
        "fingerprint": mark,
        "device": pipe.device.type,
        "left_out": {},
        "rows": rows,
    }
    for decoding, choice in DECODINGS.items():
        is_asked_for = choice.pipeline == type(pipe).__name__ and (not only or decoding in only)
        if choice.needs and is_asked_for and getattr(pipe, choice.needs) is None:
            result["left_out"][decoding] = f"the pipeline has no {choice.needs}"
    if save:
        result["saved"] = str(save_measured(model, pipe.device, rows))
    return result


def _chosen(field, only):
    """The first contender, which is plain decoding, and those of the names in `only`."""
    names = dict.fromkeys(each.decoding for each in field)
    if unknown := [name for name in only if name not in names]:
        raise StudioError(f"This model has no decoding {shown(unknown[0])} to time: choose among {', '.join(names)}.")
    return [each for number, each in enumerate(field) if number == 0 or not only or each.decoding in only]


@dataclasses.dataclass
class _Run:
    """Medians over the runs of one setting; `nodes` of its trees, 1 without; `acceptance` of drafts, or None."""

    seconds: float
    decode_seconds: float
    calls: float
    accepted: float
    acceptance: float | None
    nodes: int
    batch_rows: int


def _timed(pipe, field, batch, repeats, images) -> list[_Run]:
    prompts = [full_caption(*row) for row in sample_combinations(images, np.random.default_rng(0)).tolist()]
    _sample(pipe, field[-1].make(), prompts[:batch], 0)
    runs: list[list[tuple[list, int]]] = [[] for _ in field]
    for _ in tqdm(range(repeats), desc=f"timing, {batch} at a time", unit="round"):
        taken = [_counting(contender.make()) for contender in field]
        stats: list[list] = [[] for _ in field]
        for start in range(0, images, batch):  # all decodings in turn, so that a slow second is everybody's
            for (settings, _), own in zip(taken, stats):
                own.append(_sample(pipe, settings, prompts[start : start + batch], start))
        for (_, counted), own, each in zip(taken, stats, runs):
            each.append((own, counted.nodes if counted else own[0].window or 1))
    streams = 1 if pipe.config.default_guidance_scale in (0, 1) else 2
    return [_median(each, images, batch, streams) for each in runs]


def _counting(settings):
    """Settings whose drafts are counted, and the count; None for those without a tree of drafts."""
    if not hasattr(settings, "drafts") or isinstance(settings.drafts, Jacobi):
        return settings, None
    counted = _CountedDrafts(settings.drafts)
    return dataclasses.replace(settings, drafts=counted), counted


def _sample(pipe, settings, prompts, seed):
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    return pipe(prompts, generator=generators, decoding=settings, output_type="pt").stats


def _median(runs, images, batch, streams) -> _Run:
    def middle(of):
        return statistics.median(of(stats) for stats, _ in runs)

    return _Run(
        seconds=middle(lambda stats: sum(each.seconds["total"] for each in stats)) / images,
        decode_seconds=middle(lambda stats: sum(each.seconds["decode"] for each in stats)) / images,
        calls=statistics.mean(each.target_calls for each in runs[0][0]),
        accepted=statistics.mean(each.mean_accepted_length for each in runs[0][0]),
        acceptance=_mean_of_known([each.acceptance for each in runs[0][0]]),
        nodes=runs[0][1],
        batch_rows=batch * streams,
    )


def _mean_of_known(numbers):
    known = [number for number in numbers if number is not None]
    return statistics.mean(known) if known else None


class _CountedDrafts:
    """Drafts as of other settings, which notes how many nodes the trees have."""

    def __init__(self, source):
        self._source, self.nodes = source, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def candidate_generator(self, context):
        candidates = self._source.candidate_generator(context)
        self.nodes = candidates.nodes
        return candidates


class _Machine:
    """What this machine does at best, and what calls of one model cost on it."""

    def __init__(self, model):
        self.model, self.weights = model, step_weights(model)
        self.bandwidth, self.flops = read_bandwidth(model), peak_flops(model.device, model.dtype)
        self._calls = {}

    def call(self, rows, nodes):
        if (rows, nodes) not in self._calls:
            self._calls[rows, nodes] = call_seconds(self.model, rows, nodes)
        return self._calls[rows, nodes]

    def bounds(self, run, batch):
        size = self.model.output.weight.element_size()
        read = run.calls * self.weights * size / self.bandwidth
        work = run.calls * run.batch_rows * run.nodes * 2 * self.weights / self.flops
        return {"memory_bound_seconds": read / batch, "compute_bound_seconds": work / batch}


def _row(contender, batch, dtype, run, base, judged, machine) -> dict:
    row = {
        "decoding": contender.decoding,
        "settings": contender.settings,
        "batch": batch,
        "dtype": dtype,
        "seconds_per_image": run.seconds,
        "speedup": base.seconds / run.seconds,
        "target_calls": run.calls,
        "mean_accepted_length": run.accepted,
        **judged,
    }
    if run.acceptance is not None:
        row["acceptance"] = run.acceptance
    if run.nodes > 1:
        step = base.decode_seconds * batch / base.calls
        call, round_ = machine.call(run.batch_rows, run.nodes), run.decode_seconds * batch / run.calls
        row |= {
            "nodes": run.nodes,
            "verify_ratio": call / step,
            "draft_ratio": (round_ - call) / step,
            "break_even_length": round_ / step,
        }
    if is_approximate(contender.make()):
        row["approximate"] = True
    return row if contender.decoding == "distilled" or machine is None else row | machine.bounds(run, batch)


def _judged_as(contender: Contender, dtype: str) -> Contender:
    """Whose images the judge needs to see: in float32, Jacobi decoding with the seed's noise makes plain decoding's."""
    keeps_tokens = contender.decoding == "jacobi" and contender.settings.get("coupling", "seed") == "seed"
    return Contender("ar") if keeps_tokens and dtype == "float32" else contender


def _quality(pipe, contender, samples, plain) -> dict:
    """What the judge says of a setting, and how far its cells are from the `plain` ones (n, D), if there are any."""
    outcomes = held_out_samples(pipe, samples, decoding=contender.make())
    measured = judge_samples(pipe, outcomes)
    distance = {} if plain is None else {"latent_distance": sliced_distance(outcomes.tokens.flatten(0, 1), plain)}
    return {key: measured[key] for key in _QUALITY if key in measured} | {"quality_samples": samples, **distance}


def _plain_cells(pipe, contender, samples):
    """Cells (n, D) of images of the same prompts by other seeds, which tell how far chance alone goes."""
    return held_out_samples(pipe, samples, decoding=contender.make(), first_stream=samples).tokens.flatten(0, 1)


def _committed_quality(model, mark) -> dict:
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(COMMITTED.glob("*.json"))]
    document = next((each for each in documents if each["fingerprint"] == mark), None)
    if document is None:
        raise StudioError(f"The recorded quality is of other weights than those of {model}: run without --quick.")
    return {_key(row["decoding"], row["settings"], row["dtype"]): row for row in document["rows"]}


def _looked_up(committed, contender, dtype) -> dict:
    row = committed.get(_key(contender.decoding, contender.settings, dtype))
    if row is None:
        raise StudioError(
            f"No quality is recorded for {contender.decoding} with {contender.settings} in {dtype}: "
            "run without --quick."
        )
    return {key: row[key] for key in (*_QUALITY, "latent_distance") if key in row}


def _key(decoding, settings, dtype):
    return json.dumps([decoding, settings, dtype], sort_keys=True)
