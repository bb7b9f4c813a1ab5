"""Distilled Decoding (arXiv:2412.17153): an image in one call of a student, in a few, or together with the teacher.

The student sees a point X_t of the trajectory from noise to tokens, code vectors of the first t steps in front of
noise, and returns its end. `few_step` goes from e to an end, then from (first t steps of that, rest of the same e) to
a better end, for rising t. `hybrid` is the paper's "pre-trained-n-m": the student samples up to step n, the teacher
steps n to m - 1, the student the rest. Positions of the first `split` steps take the code of the largest logit; those
behind it keep the vector of the regression head. A student needs one conditional call: guidance and filters are what
it was taught.

Deviations from the authors' code: code numbers are carried along, so that nearest codes are sought for regressed
vectors only; heads run on the positions where they are used; the call before the teacher runs on the prefix alone,
which is all it depends on; prefixes go to the teacher with any guidance scale; noise has one stream per image; the
teacher's steps can be sampled with the noise map, which makes the whole image a function of its noise
(`teacher_sample="map"`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from studio import backends
from studio.checks import check_choice, check_integer, set_fields, shown
from studio.decoding.autoregressive import Autoregressive, Guidance, condition_rows, guided_logits, is_guided
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import OnStep, Sampled, Sampling
from studio.errors import StudioError

SNAPS = ("none", "nearest")
TEACHER_SAMPLES = ("sample", "map")
_OF_TEACHER = ("teacher_sample", "filter_order", "weights", "guidance_schedule")
_NEAREST_ROWS = 4096


@dataclass(frozen=True)
class Distilled:
    """Settings of Distilled Decoding.

    Args:
        steps: calls of the student.
        teacher_steps: `(n, m)` counted from 1: the teacher samples steps n to m - 1 ("pre-trained-n-m"); None: no step.
        times: the numbers of known steps at the calls, rising from 0, in place of those that belong to `steps`.
        split: steps that take their code from the logits; None: the student's own number.
        snap: "none" hands regressed vectors to the image decoder as they are (as published), "nearest" as codes.
        teacher_sample: "sample" samples the teacher's steps at random (as published), "map" from the image's noise.
        filter_order, weights, guidance_schedule: of the teacher's steps, as in `Autoregressive`. These and
            `teacher_sample` go with `teacher_steps` only.

    Raises:
        StudioError: for a value outside these ranges, and for settings that exclude each other.
    """

    steps: int = 1
    teacher_steps: tuple[int, int] | None = None
    times: tuple[int, ...] | None = None
    split: int | None = None
    snap: str = "none"
    teacher_sample: str = "sample"
    filter_order: str = "llamagen"
    weights: str = "auto"
    guidance_schedule: str | None = None

    def __post_init__(self) -> None:
        Autoregressive(self.filter_order, self.weights, self.guidance_schedule)
        set_fields(self, steps=check_integer("steps", self.steps, 1))
        if self.times is not None:
            times = _rising("times", self.times, 0)
            set_fields(self, times=times)
            if times[0] != 0:
                raise StudioError(f"times must be whole numbers that rise from 0, not {shown(times)}.")
            if self.steps not in (1, len(times)):
                raise StudioError(f"{len(times)} times are {len(times)} steps, not {self.steps}.")
        if self.teacher_steps is not None:
            set_fields(self, teacher_steps=_rising("teacher_steps", self.teacher_steps, 1))
            if len(self.teacher_steps) != 2:
                raise StudioError(f"teacher_steps must be (n, m) with 1 <= n < m, not {shown(self.teacher_steps)}.")
            if self.steps != 1 or self.times is not None:
                raise StudioError("Steps of the teacher go with one call of the student: leave out steps and times.")
        if self.split is not None:
            set_fields(self, split=check_integer("split", self.split))
        check_choice("snap", self.snap, SNAPS)
        check_choice("teacher_sample", self.teacher_sample, TEACHER_SAMPLES)
        of_teacher = [name for name in _OF_TEACHER if getattr(self, name) != getattr(type(self), name)]
        if of_teacher and self.teacher_steps is None:
            raise StudioError(
                f"{', '.join(of_teacher)} is of the teacher's steps: give teacher_steps, or leave it out."
            )

    def times_for(self, student: Any, steps: int | None = None) -> tuple[int, ...]:
        """Known steps at each call: `times`, or evenly spread over the first part of the steps (`student.horizon`).

        `steps` as of `distilled`.
        """
        total = steps or len(student.bounds) - 1
        calls = len(self.times or ()) or self.steps
        if calls > total:
            raise StudioError(f"The student samples {total} steps, too few for {calls} calls: give fewer steps.")
        times = self.times or spread_times(self.steps, total, student.horizon)
        if times[-1] > total or any(a >= b for a, b in pairwise(times)):
            raise StudioError(f"The student samples {total} steps, too few for calls at {', '.join(map(str, times))}.")
        return times

    def split_for(self, student: Any) -> int:
        """Steps that take their code from the logits."""
        total = len(student.bounds) - 1
        split = student.config.split if self.split is None else self.split
        if split is not None and split > total:
            raise StudioError(f"split must be at most {total}, the steps of the student, not {split}.")
        return total if split is None else split

    def reports_for(self, student: Any, steps: int | None = None) -> int:
        """How often `distilled` calls `on_step`; `steps` as there."""
        if self.teacher_steps is None:
            return len(self.times_for(student, steps))
        total = steps or len(student.bounds) - 1
        begin, end = self.teacher_span(total)
        return end - begin + (end < total)

    def teacher_span(self, total: int) -> tuple[int, int]:
        """The teacher's steps of `total`, from the first to before the second, counted from 0."""
        assert self.teacher_steps is not None
        begin, end = (step - 1 for step in self.teacher_steps)
        if end > total:
            raise StudioError(f"The teacher samples {total} steps: teacher_steps must end at {total + 1} or before.")
        return begin, end


@dataclass
class DistilledOutput(Sampled):
    """What `distilled` returns: `tokens` and costs as of `Sampled`, and

    `latents` (B, n, C), the vectors for the image decoder; `noise` (B, n, C); `student_calls`, which are counted in
    `target_calls` too. Tokens behind the split are the codes nearest to the vectors.
    """

    latents: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    student_calls: int = 0


def spread_times(calls: int, total: int, horizon: float) -> tuple[int, ...]:
    """Numbers of known steps for so many calls, evenly spread over the first `horizon` of `total` steps."""
    return tuple(round(horizon * total * call / calls) for call in range(calls))


def sample_noise(generators: list[torch.Generator], n: int, width: int, device: torch.device | str) -> torch.Tensor:
    """Gaussian noise (B, n, width), float32; image i uses generators[i] alone."""
    sampled = [torch.randn(n, width, generator=g, device=g.device).to(device) for g in generators]
    return torch.stack(sampled)


def trajectory(noise: torch.Tensor, vectors: torch.Tensor, known: int | torch.Tensor) -> torch.Tensor:
    """The point X of the trajectory (B, n, C): `vectors` at the first `known` positions (a number, or one per row)."""
    known = torch.as_tensor(known, device=noise.device).reshape(-1, 1, 1)
    return torch.where(torch.arange(noise.shape[1], device=noise.device)[:, None] < known, vectors, noise)


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Numbers (B, n) of the codes (V, C) closest to vectors (B, n, C)."""
    half_norms = codebook.square().sum(dim=-1) / 2
    parts = vectors.flatten(0, 1).split(_NEAREST_ROWS)
    found = [(part @ codebook.T - half_norms).argmax(dim=-1) for part in parts]
    return torch.cat(found).view(vectors.shape[:2])


def mix(
    student: Any,
    codebook: torch.Tensor,
    vectors: torch.Tensor,
    tokens: torch.Tensor,
    known: int,
    split: int,
    condition: dict,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of the student; the new vectors (B, n, C) and tokens (B, n).

    Steps before `known` stay as they are, those before `split` take a code by logits, the others a regressed vector.
    """
    n = vectors.shape[1]
    first, last = (min(student.bounds[step], n) for step in (known, max(known, split)))
    hidden, context = student.hidden_states(vectors, known, **condition)
    by_logits = student.classify(hidden[:, first:last], context).argmax(dim=-1)
    regressed = student.regress(hidden[:, last:], context)
    tokens = torch.cat((tokens[:, :first], by_logits, nearest(regressed, codebook)), dim=1)
    return torch.cat((vectors[:, :first], codebook[by_logits], regressed), dim=1), tokens


def few_step(
    student: Any,
    codebook: torch.Tensor,
    noise: torch.Tensor,
    condition: dict,
    *,
    times: tuple[int, ...],
    split: int,
    on_call: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, bool]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (B, n, C) and tokens (B, n) after one call for each of `times` (numbers of known steps, from 0).

    The same noise (B, n, C) stands behind the known steps at every call. `on_call(vectors, tokens)` returns the vectors
    to go on with, and whether to stop.
    """
    vectors, tokens = noise, torch.zeros(noise.shape[:2], dtype=torch.long, device=noise.device)
    for known in times:
        point = trajectory(noise, vectors, student.bounds[known])
        vectors, tokens = mix(student, codebook, point, tokens, known, split, condition)
        if on_call is not None:
            vectors, stopped = on_call(vectors, tokens)
            if stopped:
                break
    return vectors, tokens


def hybrid(
    student: Any,
    codebook: torch.Tensor,
    noise: torch.Tensor,
    condition: dict,
    teacher_samples: Callable[[torch.Tensor], torch.Tensor],
    *,
    begin: int,
    end: int,
    split: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (B, n, C) and tokens (B, n) when the teacher samples the steps from `begin` to `end`, counted from 0.

    `teacher_samples(prefix)` takes the tokens of the first `begin` steps and returns those of the first `end` steps, or
    fewer when it was stopped. Calls of the student: one if begin > 0, and one if the teacher leaves steps over.
    """
    ahead = noise[:, : student.bounds[begin]]
    tokens = torch.zeros(ahead.shape[:2], dtype=torch.long, device=noise.device)
    if begin:
        _, tokens = mix(student, codebook, ahead, tokens, 0, split, condition)
    tokens = teacher_samples(tokens)
    vectors, sampled = codebook[tokens], tokens.shape[1]
    if sampled < student.bounds[end] or sampled == noise.shape[1]:
        return vectors, tokens
    vectors = torch.cat((vectors, noise[:, sampled:]), dim=1)
    return mix(student, codebook, vectors, tokens, end, split, condition)


@torch.no_grad()
def teacher_tokens(
    teacher: Any,
    condition: dict,
    prefix: torch.Tensor,
    end: int,
    sample: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    settings: Autoregressive | None = None,
    on_step: OnStep | None = None,
    cost: Sampled | None = None,
) -> torch.Tensor:
    """Tokens (B, end) of an autoregressive teacher that goes on from the prefix (B, begin).

    Args:
        teacher: a `LlamaGen` in evaluation mode.
        sample: called as (index, guided logits (B, V)), returns tokens (B,).
        guidance_scale, cfg_interval, settings, on_step: as of `autoregressive`; a stopped loop returns fewer tokens.
        cost: has its calls counted, if given.
    """
    batch, begin = prefix.shape
    settings = settings or Autoregressive()
    network = backends.select(teacher, settings.weights)
    guidance = Guidance.of(guidance_scale, cfg_interval, settings.guidance_schedule, teacher)
    rows, valid = condition_rows(teacher, condition, guided=is_guided(begin, guidance_scale, cfg_interval))
    tokens = torch.cat((prefix, prefix.new_zeros(batch, end - begin)), dim=1)
    cache = network.new_cache(len(rows))
    logits = network.prefill(rows, valid, cache)
    if begin:
        logits = network.extend(prefix.repeat(len(rows) // batch, 1), cache)[:, -1]
    for index in range(begin, end):
        if cost is not None:
            cost.target_calls += 1
            cost.row_calls += len(logits)
        guided = guided_logits(logits, guidance.scale_at(index)) if len(logits) > batch else logits
        tokens[:, index] = sample(index, guided)
        if on_step is not None and on_step(index, tokens[:, : index + 1]):
            return tokens[:, : index + 1]
        if index + 1 < end:
            if not is_guided(index + 1, guidance_scale, cfg_interval) and cache.rows > batch:
                cache.keep_rows(batch)
            logits = network.extend(tokens[:, index : index + 1].repeat(cache.rows // batch, 1), cache)[:, -1]
    return tokens


def map_sample(
    noise: torch.Tensor, noise_map: NoiseMap, sampling: Sampling
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A `sample` of `teacher_tokens` by noise (B, n, C): token i is a function of its distribution and its noise."""
    support = sampling.top_k or None
    return lambda index, logits: noise_map(noise[:, index], sampling.probabilities(logits), support)


def sample_pairs(
    teacher: Any,
    condition: dict,
    noise: torch.Tensor,
    noise_map: NoiseMap,
    *,
    sampling: Sampling,
    guidance_scale: float,
    settings: Autoregressive | None = None,
) -> torch.Tensor:
    """The tokens (B, n) to which noise (B, n, C) leads: the training pairs of a student, sampled without images."""
    prefix = torch.zeros(len(noise), 0, dtype=torch.long, device=noise.device)
    sample = map_sample(noise, noise_map, sampling)
    return teacher_tokens(
        teacher, condition, prefix, noise.shape[1], sample, guidance_scale=guidance_scale, settings=settings
    )


@torch.no_grad()
def distilled(
    model: Any,
    condition: dict,
    *,
    student: Any,
    codebook: torch.Tensor,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    settings: Distilled | None = None,
    steps: int | None = None,
    on_step: OnStep | None = None,
    noise: torch.Tensor | None = None,
    noise_map: NoiseMap | None = None,
) -> DistilledOutput:
    """Samples the tokens of B images.

    Args:
        model: the teacher, a `LlamaGen`; needed for `teacher_steps` only.
        condition: as of `autoregressive`; student and teacher take the same.
        student: a `DistilledStudent` in evaluation mode.
        codebook: code vectors (V, C), unit vectors for LlamaGen.
        generators: one per image: its noise, then the teacher's random samples.
        sampling, guidance_scale, cfg_interval: of the teacher's steps; the student knows neither.
        steps: how many first steps to sample; all when None.
        on_step: called as (index, tokens so far (B, index + 1), which may be written to) after each token of the
            teacher and, with index n - 1, after each call of the student for all tokens; True stops the loop.
        noise: (B, N, C) for all tokens, in place of what the generators would sample.
        noise_map: for `teacher_sample="map"`, to spare measuring the codebook anew.

    Raises:
        StudioError: for settings that the student cannot serve, and for teacher's steps without a teacher.
    """
    settings = settings or Distilled()
    sampling = sampling or Sampling(order=settings.filter_order)
    total = steps or len(student.bounds) - 1
    split, times, n = settings.split_for(student), settings.times_for(student, steps), student.bounds[total]
    began = time.perf_counter()
    codebook = codebook.to(student.device, torch.float32)
    if noise is None:
        noise = sample_noise(generators, student.bounds[-1], codebook.shape[1], student.device)
    noise = noise[:, :n]
    sampled = DistilledOutput(torch.zeros(len(noise), 0, dtype=torch.long), noise=noise)
    call = _Counted(backends.select_student(student), sampled)

    def after_call(vectors, tokens):
        if on_step is None:
            return vectors, False
        before = tokens.clone()
        stopped = on_step(n - 1, tokens)
        return torch.where((tokens != before)[:, :, None], codebook[tokens], vectors), bool(stopped)

    if settings.teacher_steps is None:
        sampled.latents, sampled.tokens = few_step(
            call, codebook, noise, condition, times=times, split=split, on_call=after_call
        )
    else:
        begin, end = settings.teacher_span(total)
        if model is None:
            raise StudioError("teacher_steps needs the teacher: give the model that the student was distilled from.")
        sample: Any = partial(_sampled, sampling, generators)
        if settings.teacher_sample == "map":
            sample = map_sample(noise, noise_map or NoiseMap(codebook), sampling)
        of_teacher = Autoregressive(weights=settings.weights, guidance_schedule=settings.guidance_schedule)
        options = {"guidance_scale": guidance_scale, "cfg_interval": cfg_interval, "settings": of_teacher}

        def teacher_samples(prefix):
            return teacher_tokens(model, condition, prefix, end, sample, on_step=on_step, cost=sampled, **options)

        sampled.latents, sampled.tokens = hybrid(
            call, codebook, noise, condition, teacher_samples, begin=begin, end=end, split=split
        )
        if sampled.tokens.shape[1] == n and end < total:
            sampled.latents, _ = after_call(sampled.latents, sampled.tokens)
    if settings.snap == "nearest":
        sampled.latents = codebook[sampled.tokens]
    sampled.seconds = {"prefill": 0.0, "decode": time.perf_counter() - began}
    return sampled


class _Counted:
    """A student whose calls are counted."""

    def __init__(self, student, sampled: DistilledOutput) -> None:
        self.student, self.sampled = student, sampled

    def __getattr__(self, name):
        return getattr(self.student, name)

    def hidden_states(self, vectors, known, **condition):
        self.sampled.student_calls += 1
        self.sampled.target_calls += 1
        self.sampled.row_calls += len(vectors)
        return self.student.hidden_states(vectors, known, **condition)


def _sampled(sampling: Sampling, generators: list[torch.Generator], index: int, logits: torch.Tensor) -> torch.Tensor:
    return sampling.sample(logits, generators)


def _rising(name: str, values, minimum: int) -> tuple[int, ...]:
    """Whole numbers that rise, as a tuple. Raises: `StudioError` for anything else."""
    if not isinstance(values, list | tuple) or not values:
        raise StudioError(f"{name} must be whole numbers in a tuple, not {shown(values)}.")
    numbers = tuple(check_integer(f"Each of {name}", value, minimum) for value in values)
    if any(a >= b for a, b in pairwise(numbers)):
        raise StudioError(f"{name} must be whole numbers that rise, not {shown(values)}.")
    return numbers
