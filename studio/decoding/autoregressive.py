"""Plain autoregressive decoding: one call of the model per token.

With classifier-free guidance (arXiv:2207.12598) the conditional rows and their unconditional twins run as one batch,
both fed the same token: `logits = unconditional + scale * (conditional - unconditional)`. Inside the guidance interval
only (LlamaGen, arXiv:2406.06525): token t is guided when t = 0 or t - 1 <= interval; after the last guided token the
unconditional rows leave the batch and the cache, and a step costs half. `Guidance` is the same for loops in which the
tokens of one call have different positions in the image.

The scale may rise over an image ("ELM: Elucidating the design space of language models for image generation",
arXiv:2410.16257): `s_t = 1 + (s - 1)(t + 1) / n` for token t of n, so that the first ones stay varied and the last ones
follow the prompt. In loops that sample several tokens a call, the share of the image takes the place of (t + 1) / n.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from studio import backends
from studio.checks import check_choice
from studio.decoding.sampling import KnownTokens, OnStep, Sampled, Sampling
from studio.models.llamagen import LlamaGen

SCHEDULES = ("constant", "linear")


def check_schedule(schedule: str | None) -> None:
    """Raises a `StudioError` for what is neither a schedule nor None."""
    if schedule is not None:
        check_choice("guidance_schedule", schedule, SCHEDULES)


def scheduled_scale(schedule: str | None, scale: float, share: float) -> float:
    """The guidance scale where this share of an image is sampled.

    Args:
        schedule: one of `SCHEDULES`; None is constant.
        scale: at its greatest.
        share: in [0, 1].
    """
    return 1 + (scale - 1) * share if schedule == "linear" else scale


@dataclass
class Guidance:
    """Scale and interval as of `autoregressive`; `streams` is 2 while there are unconditional rows, else 1.

    `by_token` holds the scale of each token of an image, float32, where they differ.
    """

    scale: float
    interval: int
    streams: int
    by_token: torch.Tensor | None = None

    @classmethod
    def of(cls, scale: float, interval: int, schedule: str | None, model: LlamaGen) -> "Guidance":
        """The guidance of a call, by a `guidance_schedule`."""
        guidance = cls(scale, interval, 2 if is_guided(0, scale, interval) else 1)
        if guidance.streams == 2 and schedule == "linear":
            total = model.num_tokens
            scales = [scheduled_scale("linear", scale, (index + 1) / total) for index in range(total)]
            guidance.by_token = torch.tensor(scales, device=model.device)
        return guidance

    def scale_at(self, index: int | torch.Tensor) -> float | torch.Tensor:
        """The scale for the token of this number, or (B, n, 1) for each of several (B, n); past the end the last."""
        if self.by_token is None:
            return self.scale
        if isinstance(index, int):
            return self.by_token[index]
        return self.by_token[index.clamp(max=len(self.by_token) - 1)][:, :, None]

    def scales(self, index: torch.Tensor) -> torch.Tensor | None:
        """Scales (B, n), float32, of the tokens `index` (B, n); None where not every one is guided."""
        if self.streams == 1 or self.interval >= 0:
            return None
        scale = self.scale_at(index)
        if isinstance(scale, torch.Tensor):
            return scale[:, :, 0]
        return torch.full(index.shape, scale, device=index.device)

    def combine(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Logits (B, n, V) out of those of all rows (B or 2B, n, V); `index` (B, n) is of the token they predict."""
        if self.streams == 1:
            return logits
        guided = guided_logits(logits, self.scale_at(index))
        if self.interval < 0:
            return guided
        inside = (index == 0) | (index - 1 <= self.interval)
        return torch.where(inside[:, :, None], guided, logits[: len(guided)])

    def rows(self, per_image: torch.Tensor) -> torch.Tensor:
        """What belongs to images (B, ...), for all rows."""
        return torch.cat((per_image, per_image)) if self.streams == 2 else per_image

    def is_over(self, length: int) -> bool:
        """Whether no token behind the first `length` is guided, though unconditional rows are still there."""
        return self.streams == 2 and 0 <= self.interval < length - 1


WEIGHTS = ("auto", "plain", "native", "float32", "float16", "int8")


@dataclass(frozen=True)
class Autoregressive:
    """Settings of the plain loop.

    Args:
        filter_order: "llamagen" (top-k before top-p) or "lantern" (top-p before top-k).
        weights: "auto" runs float32 models on a CPU in the fastest exact way that works there, models on a GPU as CUDA
            graphs, and others as they are; "plain" always runs the model as it is; "native" asks for the step compiled
            from C, "float32", "float16" and "int8" for packed CPU weights.
        guidance_schedule: "constant", or "linear" to let guidance rise over the tokens of an image; None leaves it to
            whoever samples, and is constant where nobody says.
    """

    filter_order: str = "llamagen"
    weights: str = "auto"
    guidance_schedule: str | None = None

    def __post_init__(self) -> None:
        Sampling(order=self.filter_order)
        check_choice("weights", self.weights, WEIGHTS)
        check_schedule(self.guidance_schedule)

    @property
    def joins(self) -> bool:
        """Whether requests may join a running batch, which runs the model one way."""
        return self.weights == "auto"


def is_guided(token: int, guidance_scale: float, cfg_interval: int) -> bool:
    """Whether this token is sampled with guidance; a scale of 1 (or 0) is no guidance, interval -1 has no end."""
    inside = cfg_interval < 0 or token == 0 or token - 1 <= cfg_interval
    return guidance_scale not in (0, 1) and inside


def guided_logits(logits: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Combines logits (2B, V), conditional rows first, into (B, V); a tensor of scales has their shape with V = 1."""
    conditional, unconditional = logits.chunk(2)
    return (conditional - unconditional).mul_(scale).add_(unconditional)


Embedded = TypeVar("Embedded", covariant=True)


class Conditional(Protocol[Embedded]):
    """A model with a condition: its device, and how it embeds classes or captions."""

    @property
    def device(self) -> torch.device:
        """Of the model."""
        ...

    def embed_condition(self, *args: Any, **condition: Any) -> Embedded:
        """As of `LlamaGen`."""
        ...


def condition_rows(model: Conditional[Embedded], condition: dict, guided: bool) -> Embedded:
    """What a model makes of B conditions, followed by B unconditional ones with the same padding where `guided`.

    Of a `LlamaGen` this is the prefix (B or 2B, T, dim) and its valid positions.
    """
    if not guided:
        return model.embed_condition(**condition)
    doubled = {name: torch.cat((value, value)) for name, value in condition.items() if value is not None}
    rows = len(next(iter(doubled.values())))
    drop = torch.arange(rows, device=model.device) >= rows // 2
    return model.embed_condition(**doubled, drop=drop)


@torch.no_grad()
def autoregressive(
    model: LlamaGen,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    settings: Autoregressive | None = None,
    num_tokens: int | None = None,
    on_step: OnStep | None = None,
    known: KnownTokens | None = None,
) -> Sampled:
    """Samples the tokens of B images.

    Args:
        model: a `LlamaGen` in evaluation mode, or a network with the same calls.
        condition: `{"class_labels": (B,)}` or `{"captions": (B, T, C), "caption_mask": (B, T)}`.
        generators: one per image.
        num_tokens: how many first tokens to sample; all when None.
        on_step: called as (index, tokens so far (B, index + 1), a view that may be written to); True stops the loop.
        known: tokens (B, L) that are fed where they stand; the others are sampled given those before them. Runs of them
            take one call.
    """
    settings = settings or Autoregressive()
    sampling = sampling or Sampling(order=settings.filter_order)
    began = time.perf_counter()
    network = backends.select(model, settings.weights)
    guidance = Guidance.of(guidance_scale, cfg_interval, settings.guidance_schedule, model)
    prefix, valid = condition_rows(model, condition, guided=guidance.streams == 2)
    batch, total = len(generators), num_tokens or model.num_tokens
    tokens = torch.zeros(batch, total, dtype=torch.long, device=prefix.device)
    sampled = Sampled(tokens)
    cache = network.new_cache(len(prefix))
    logits = network.prefill(prefix, valid, cache)
    sampled.target_calls, sampled.row_calls = 1, len(logits)
    sampled.seconds["prefill"] = time.perf_counter() - began
    certain, fed = [False] * total if known is None else known.mask.all(dim=0).tolist(), 0
    for index in range(total):
        if index > fed and not certain[index]:
            guided = is_guided(index, guidance_scale, cfg_interval)
            if not guided and cache.rows > batch:
                cache.keep_rows(batch)
            behind, fed = tokens[:, fed:index], index
            logits = network.extend(behind.repeat(2, 1) if guided else behind, cache)[:, -1]
            sampled.target_calls += 1
            sampled.row_calls += len(logits)
        combined = guided_logits(logits, guidance.scale_at(index)) if len(logits) > batch else logits
        tokens[:, index] = sampling.sample(combined, generators)
        if known is not None:
            tokens[:, index] = torch.where(known.mask[:, index], known.tokens[:, index], tokens[:, index])
        if on_step is not None and on_step(index, tokens[:, : index + 1]):
            sampled.tokens = tokens[:, : index + 1]
            break
    sampled.seconds["decode"] = time.perf_counter() - began - sampled.seconds["prefill"]
    return sampled
