"""What continuous speculative decoding could gain at best on this machine, from what its parts cost.

Plain decoding pays a call of the target's transformer and T denoising steps in a row for each of K steps. Exact
speculation adds a call of the draft's transformer and its T denoising steps, and needs the target's head only once, for
all steps of a path together; it gains at best, when every path passes, where that call and the draft cost less than the
target's T steps. Relaxed speculation saves calls of the target, but target and draft both denoise every token.

Large models are not needed for this: weights are random, the head has its published size, and the transformer is timed
with one and with two blocks of each half, and continued in a straight line.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from studio import backends
from studio.checkpoints.loading import load, pick_device
from studio.checks import shown
from studio.decoding.autoregressive import condition_rows
from studio.decoding.cspd import ContinuousSpeculative
from studio.decoding.denoising import ReverseTransitions, TimedHead, denoise
from studio.decoding.mar import MaskedAutoregressive
from studio.errors import StudioError
from studio.models.mar import MAR, PRESETS
from studio.pipelines.mar import MARPipeline

PUBLISHED = {"mar-l": "L", "mar-h": "H"}
_DRAFT = "B"
_SCALE = 3.0
_TIMED_STEPS = 10


@dataclass(frozen=True)
class PartCosts:
    """Seconds of one guided image's parts.

    Attributes:
        call: one call of the transformer, half of the tokens known.
        step: one denoising step of the tokens of a step.
        block_step: one of the tokens of all steps of a relaxed draft.
        path_step: as `step`, with all steps of a path in one call.
    """

    call: float
    step: float
    block_step: float
    path_step: float


def part_costs(model: MAR, tokens: int, block: int, seconds: float = 1.0) -> PartCosts:
    """The least seconds of many runs of each part, for `tokens` tokens a step and `block` tokens a draft."""
    parts = {
        "call": _call_of(model, tokens),
        "step": _walk_of(model, tokens),
        "block_step": _walk_of(model, block),
        "path_step": _path_of(model, tokens),
    }
    least = dict.fromkeys(parts, float("inf"))
    for name, part in parts.items():
        part()
        began = time.perf_counter()
        while least[name] == float("inf") or time.perf_counter() - began < seconds:
            least[name] = min(least[name], backends.timed(part, model.device)[0])
    return PartCosts(least["call"], *(least[name] / _TIMED_STEPS for name in ("step", "block_step", "path_step")))


def _call_of(model: MAR, tokens: int) -> Callable[[], object]:
    total = model.num_tokens
    buffer, _ = condition_rows(model, _condition(model), guided=True)
    values = torch.zeros(1, total, model.config.token_dim, device=model.device)
    order = torch.arange(total, device=model.device)[None]
    visible, wanted = order[:, total // 2 :], order[:, :tokens]
    return torch.no_grad()(lambda: model.conditions(values, visible, wanted, buffer))


def _walk_of(model: MAR, tokens: int) -> Callable[[], object]:
    kernels, noise = _kernels_of(model, tokens)
    return torch.no_grad()(lambda: list(denoise(kernels(), noise[0], noise)))


def _path_of(model: MAR, tokens: int) -> Callable[[], object]:
    kernels, noise = _kernels_of(model, tokens)
    return torch.no_grad()(lambda: kernels().along(noise, 0))


def _kernels_of(model: MAR, tokens: int) -> tuple[Callable[[], ReverseTransitions], torch.Tensor]:
    """New kernels each time, since a part of their work is kept; and noise (T, n, D)."""
    with torch.no_grad():
        head = TimedHead(model.diffloss, _TIMED_STEPS)
    conditions = torch.zeros(2, tokens, model.config.decoder_dim, device=model.device)
    noise = torch.randn(_TIMED_STEPS, tokens, model.config.token_dim, device=model.device)
    return lambda: ReverseTransitions(head, conditions, _SCALE), noise


def _condition(model: MAR) -> dict[str, torch.Tensor]:
    config, device = model.config, model.device
    if config.num_classes is not None:
        return {"class_labels": torch.zeros(1, dtype=torch.long, device=device)}
    states = torch.zeros(1, config.caption_length, config.caption_dim, device=device)
    return {"captions": states, "caption_mask": torch.ones(states.shape[:2], dtype=torch.bool, device=device)}


def speculation_at_best(target: PartCosts, draft: PartCosts, settings: ContinuousSpeculative) -> dict[str, float]:
    """Seconds of the tokens of an image, and what speculation gains if every draft passes.

    Args:
        target, draft: what they cost.
        settings: "relaxed" ones, filled.

    Returns:
        `{"plain_seconds", "exact_at_best", "exact_at_worst", "relaxed_at_best"}`: the gains are plain seconds over
        theirs; at worst every path fails at its first step.
    """
    steps, most = settings.steps or 1, settings.diffusion_steps or 1
    plain_step = target.call + most * target.step
    drafted = draft.call + most * draft.step
    exact_step = drafted + target.call + most * target.path_step
    first = int(steps * settings.prefill) + 1
    blocks = sum(
        number % (settings.draft_steps or 1) == 0 or number + 1 == steps for number in range(min(first, steps), steps)
    )
    block_step = target.call + most * target.block_step
    own = min(first, steps) * plain_step
    rest = steps - min(first, steps)
    plain = steps * plain_step
    return {
        "plain_seconds": plain,
        "exact_at_best": plain / (own + rest * exact_step),
        "exact_at_worst": plain / (own + rest * (exact_step + most * target.step)),
        "relaxed_at_best": plain / (own + rest * drafted + blocks * block_step),
    }


def bench_cspd(
    model: str = "emoji-mar", *, published: tuple[str, ...] = (), device: str | None = None, seconds: float = 1.0
) -> dict:
    """Times the parts of a MAR and its drafter, and of published sizes with MAR-B as the drafter.

    Args:
        model: a bundled name or folder of a MAR that has a drafter.
        published: names of `PUBLISHED`: random weights of that size, 64 steps of 100 denoising steps.
        device: where it runs; CUDA where there is one when `None`.
        seconds: how long to measure each part, at least.

    Returns:
        `{"device", "rows"}`. A row has "target", "draft", "steps", "diffusion_steps", the seconds of `PartCosts` as
        "target_call", "draft_call", "target_step", "draft_step" and "target_path_step", and the gains of
        `speculation_at_best`.

    Raises:
        StudioError: an unknown size, or a model that has no drafter.
    """
    if unknown := [name for name in published if name not in PUBLISHED]:
        raise StudioError(f"There is no size {shown(unknown[0])}: choose among {', '.join(PUBLISHED)}.")
    pipe = load(model, device=device)
    if not isinstance(pipe, MARPipeline) or pipe.drafter is None:
        raise StudioError(
            f"{model} is no MAR with a drafter: name emoji-mar, or a folder of `studio train mar-drafter`."
        )
    asked = ContinuousSpeculative(mode="relaxed")
    config = pipe.config
    filled = asked.filled(steps=config.default_num_inference_steps, diffusion_steps=config.default_diffusion_steps)
    total = pipe.transformer.num_tokens
    costs = [part_costs(part, *_sizes(filled, total), seconds) for part in (pipe.transformer, pipe.drafter)]
    rows = [_row(model, f"{model} drafter", filled, *costs)]
    filled = asked.filled(**MaskedAutoregressive.DEFAULTS)
    place, drafted = pick_device(device), None
    for name in published:
        drafted = drafted or _published_costs(_DRAFT, filled, place, seconds)
        costs = [_published_costs(PUBLISHED[name], filled, place, seconds), drafted]
        rows.append(_row(name, f"mar-{_DRAFT.lower()}", filled, *costs))
    return {"device": pipe.device.type, "rows": rows}


def _sizes(settings: ContinuousSpeculative, total: int) -> tuple[int, int]:
    """Tokens of a step, on average, and of a relaxed draft."""
    tokens = max(1, round(total / (settings.steps or 1)))
    return tokens, min(total, tokens * (settings.draft_steps or 1))


def _published_costs(size: str, settings: ContinuousSpeculative, device: torch.device, seconds: float) -> PartCosts:
    """Costs of a published size: its head as it is, its transformer from one and two blocks of each half."""
    calls, parts = [], None
    for depth in (2, 1):
        torch.manual_seed(0)
        model = MAR.preset(size, encoder_depth=depth, decoder_depth=depth).to(device).eval()
        parts = part_costs(model, *_sizes(settings, model.num_tokens), seconds)
        calls.append(parts.call)
    assert parts is not None
    depth = PRESETS[size]["encoder_depth"]
    call = calls[1] + (depth - 1) * max(0.0, calls[0] - calls[1])
    return PartCosts(call, parts.step, parts.block_step, parts.path_step)


def _row(name: str, drafter: str, settings: ContinuousSpeculative, target: PartCosts, draft: PartCosts) -> dict:
    return {
        "target": name,
        "draft": drafter,
        "steps": settings.steps,
        "diffusion_steps": settings.diffusion_steps,
        "target_call": target.call,
        "draft_call": draft.call,
        "target_step": target.step,
        "draft_step": draft.step,
        "target_path_step": target.path_step,
        **speculation_at_best(target, draft, settings),
    }
