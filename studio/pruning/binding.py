"""Pruning of visual tokens on a stock transformers model, by shorter inputs.

The picture is encoded once, tokens are chosen, and the image tokens that were not chosen are taken out of the prompt,
so that prefill and KV cache really shrink. The model gets its features through the public argument
`mm_encoder_outputs`; no model code is touched, and any attention backend, beams, batches, several pictures, labels and
static caches work.
"""

import functools
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from studio.errors import StudioError
from studio.pruning.budget import count, is_fraction
from studio.pruning.cutting import attention_mask_of, cut, positions_from
from studio.pruning.families import Family, family_of, mismatch
from studio.pruning.layout import Layout
from studio.pruning.methods import SCORES, WITH_REFERENCE, method_named
from studio.pruning.newlines import check_newline

POSITIONS = ("original", "compact")
_OWN = ("features", "budget", "attention", "layout", "generator", "newline", "reference")


@dataclass(frozen=True, eq=False)
class PruneInfo:
    """What was pruned; lists have one entry for each picture, in the order of the prompt.

    Args:
        method, keep: as given.
        tokens_before, tokens_after: tokens the language model receives for the picture, newlines included.
        kept: (tokens_after,) places in the packed sequence, sorted, on the CPU.
        layouts: where the packed tokens come from.
        removed: by how many columns the prompt is shorter.
        next_positions: (B,) position of the token that follows each row; three-axis models use it on all axes.
        seconds: "encode", the vision tower, and "select", the choice of tokens.
    """

    method: str
    keep: float
    tokens_before: list[int] = field(default_factory=list)
    tokens_after: list[int] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    removed: int = 0
    next_positions: torch.Tensor | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "select": 0.0})


@dataclass
class PruneRecord:
    """What `prune` yields: `info` of the latest call with pictures, `None` before the first."""

    info: PruneInfo | None = None


@dataclass(frozen=True)
class _Settings:
    method: str
    keep: float
    positions: str
    newline: str
    reference: bool
    generator: torch.Generator
    options: dict


def prune_inputs(
    model,
    inputs,
    method: str,
    keep: float = 0.1,
    *,
    positions: str | None = None,
    newline: str = "row",
    reference: bool = False,
    generator: torch.Generator | None = None,
    **options,
) -> tuple[dict, PruneInfo]:
    """Encodes the pictures of a prompt, chooses tokens, and shortens the prompt.

    The result goes into `model.generate(**pruned)` or `model(**pruned)` unchanged, once: transformers repeats
    `mm_encoder_outputs` in place for beams. Steps after the prefill that you make yourself need `position_ids` counted
    on from `info.next_positions`; `generate` does so.

    Args:
        model: a vision-language model of transformers (see `studio.pruning.families.FAMILIES`).
        inputs: what its processor returns, `labels` too; without pictures they come back as they are.
        method: "divprune", "hired", "globalcom2", "random" or "uniform".
        keep: the fraction in (0, 1] of the tokens that the language model receives for each picture, newlines included,
            or a whole number of tokens. 1.0 keeps everything.
        positions: "original", the tokens that stay keep their positions (as if the others were masked), or "compact",
            positions are counted anew; on three-axis models compact positions are those of text. `None` is "compact"
            for `reference` and "original" otherwise.
        newline: "row", "keep", "drop" or "compete"; see `studio.pruning.newlines`.
        reference: the authors' selection, with its own count.
        generator: for "random"; when `None`, one of seed 0 that a block of `prune` draws on from call to call.
        options: settings of the method, such as `alpha` of hired or `tau` of globalcom2.

    Returns:
        The inputs without pixels and with `mm_encoder_outputs`, and a `PruneInfo`.

    Errors: `StudioError` for settings that do not fit, a model or pair that is not supported (with the reason), videos,
        `inputs_embeds`, a filled cache beside new pictures, and a prompt whose image tokens do not match the pictures.
    """
    settings = _settings(method, keep, positions, newline, reference, generator, options)
    return _prune(family_of(model, method), dict(inputs), settings)


@contextmanager
def prune(
    model,
    method: str,
    keep: float = 0.1,
    *,
    positions: str | None = None,
    newline: str = "row",
    reference: bool = False,
    generator: torch.Generator | None = None,
    restore_prompt: bool = True,
    **options,
) -> Iterator[PruneRecord]:
    """A block in which `model.generate` and `model(...)` prune the tokens of every picture they get.

        with studio.prune(model, "divprune", keep=0.1) as record:
            out = model.generate(**inputs, max_new_tokens=50)
        print(record.info.tokens_before, record.info.tokens_after)

    Logits and loss of `model(...)` are those of the shorter prompt. `max_length` and `min_length` of `generate` still
    count the whole prompt. Afterwards the model is as it was, also after an exception.

    Args:
        model, method, keep, positions, newline, reference, generator, options: as in `prune_inputs`.
        restore_prompt: whether the sequences that `generate` returns begin with the whole prompt, so that
            `out[:, inputs.input_ids.shape[1]:]` is the answer. `False` returns the short prompt, which fits the cache
            when a conversation goes on with it (use positions="compact" then).

    Yields:
        A `PruneRecord`.

    Errors: `StudioError` as in `prune_inputs`, and for `use_cache=False` in `generate` with original positions.
    """
    settings = _settings(method, keep, positions, newline, reference, generator, options)
    family, record = family_of(model, method), PruneRecord()
    wrappers = {"forward": _forward(model, family, settings, record)}
    if hasattr(model, "generate"):
        wrappers["generate"] = _generate(model, family, settings, record, restore_prompt)
    before = {name: model.__dict__[name] for name in wrappers if name in model.__dict__}
    try:
        for name, wrapper in wrappers.items():
            setattr(model, name, wrapper)
        yield record
    finally:
        for name in wrappers:
            if name in before:
                setattr(model, name, before[name])
            else:
                model.__dict__.pop(name, None)


def _settings(method, keep, positions, newline, reference, generator, options) -> _Settings:
    known = set(inspect.signature(method_named(method)).parameters) - set(_OWN)
    if unknown := set(options) - known:
        allowed = f"takes {', '.join(sorted(known))}" if known else "has no settings"
        raise StudioError(f"{method} {allowed}, not {', '.join(sorted(unknown))}.")
    count(keep, 1)
    check_newline(newline, compete=method in ("divprune", "random"))
    if reference and method not in WITH_REFERENCE:
        raise StudioError(f"reference=True is for {', '.join(WITH_REFERENCE)}: {method} has no authors' code.")
    positions = positions or ("compact" if reference else "original")
    if positions not in POSITIONS:
        raise StudioError(f"positions is one of {', '.join(POSITIONS)}, not {positions!r}.")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return _Settings(method, keep, positions, newline, reference, generator, options)


def _has_pictures(inputs: dict) -> bool:
    return inputs.get("pixel_values") is not None


def _prune(family: Family, inputs: dict, settings: _Settings) -> tuple[dict, PruneInfo]:
    if not _has_pictures(inputs):
        return inputs, PruneInfo(settings.method, settings.keep)
    _check_inputs(inputs)
    ids = inputs["input_ids"]
    encoder_inputs = _encoder_inputs(family, inputs)
    started = _now(ids.device)
    with family.tap(SCORES.get(settings.method, ()), inputs) as tap:
        encoded = family.base.get_image_features(**encoder_inputs, return_dict=True)
    features = family.features(encoded, inputs)
    image = ids == family.model.config.image_token_id
    if int(image.sum()) != sum(map(len, features)):
        raise StudioError(mismatch(int(image.sum()), sum(map(len, features))))
    encoded_at = _now(ids.device)
    layouts = family.layouts(features, inputs)
    kept = _choose(family, tap, inputs, features, layouts, settings)
    selected_at = _now(ids.device)

    stays = torch.cat([torch.isin(torch.arange(len(part)), places) for part, places in zip(features, kept)])
    keep = torch.ones_like(image)
    keep[image] = stays.to(ids.device)
    positions = _positions(family, inputs)
    out = {name: value for name, value in inputs.items() if name not in encoder_inputs}
    if not stays.all():
        out |= _shorter(family, out, keep, positions, settings.positions)
        positions = out["position_ids"]
    elif family.mrope:
        out["image_grid_thw"] = inputs["image_grid_thw"]
    row_tokens = (keep & image).sum(dim=1).tolist()
    out["mm_encoder_outputs"] = {"image": _encoder_output(family, encoded, features, kept, row_tokens)}
    info = PruneInfo(
        method=settings.method,
        keep=settings.keep,
        tokens_before=[len(part) for part in features],
        tokens_after=[len(places) for places in kept],
        kept=kept,
        layouts=layouts,
        removed=ids.shape[1] - out["input_ids"].shape[1],
        next_positions=(positions[-3:] if family.mrope else positions[None]).amax(dim=(0, 2)) + 1,
        seconds={"encode": encoded_at - started, "select": selected_at - encoded_at},
    )
    return out, info


def _encoder_inputs(family: Family, inputs: dict) -> dict:
    names = inspect.signature(family.base.get_image_features).parameters
    return {name: inputs[name] for name in names if name != "kwargs" and name in inputs}


def _check_inputs(inputs: dict) -> None:
    if inputs.get("input_ids") is None:
        raise StudioError("Give input_ids: the image tokens of inputs_embeds cannot be told from text.")
    if inputs.get("pixel_values_videos") is not None:
        raise StudioError("Only pictures are pruned: give videos to the model outside of the block.")
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise StudioError("Give all pictures with the first prompt: new ones cannot be pruned behind a filled cache.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _choose(family, tap, inputs, features, layouts, settings: _Settings) -> list[torch.Tensor]:
    if is_fraction(settings.keep) and settings.keep == 1:
        return [torch.arange(len(part)) for part in features]
    needs = settings.method in SCORES
    scores = family.scores(tap, inputs, len(features)) if needs else [None] * len(features)
    given = {"newline": settings.newline, **settings.options}
    if settings.reference:
        given["reference"] = True
    select = method_named(settings.method)
    return [
        select(part, settings.keep, attention=score, layout=layout, generator=settings.generator, **given).cpu()
        if len(part)
        else torch.arange(0)
        for part, score, layout in zip(features, scores, layouts)
    ]


def _positions(family: Family, inputs: dict) -> torch.Tensor:
    """Positions of the whole prompt: (B, L), or (3, B, L) with three axes."""
    given, mask = inputs.get("position_ids"), attention_mask_of(inputs)
    if given is not None:
        return given[-3:] if family.mrope else given.expand(mask.shape)
    if not family.mrope:
        return positions_from(mask)
    ids = inputs["input_ids"]
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        kinds = (ids == family.model.config.image_token_id).int()
    return family.base.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
    )[0]


def _shorter(family: Family, inputs: dict, keep, positions, kind: str) -> dict:
    """The inputs without the tokens that go. The mask is always there: without one, transformers takes a gap in the
    positions for the start of another sequence."""
    pad = family.model.config.get_text_config().pad_token_id
    mask, image = attention_mask_of(inputs), inputs["input_ids"] == family.model.config.image_token_id
    keep = keep & (mask.bool() | image)
    out = cut({**inputs, "attention_mask": mask, "position_ids": positions}, keep, 0 if pad is None or pad < 0 else pad)
    text = positions_from(out["attention_mask"])
    if kind == "compact":
        out["position_ids"] = text.expand(3, *text.shape) if family.mrope else text
    if family.mrope:
        _set_rope_deltas(family, out)
        out["position_ids"] = torch.cat((text[None], out["position_ids"]))
    return out


def _set_rope_deltas(family: Family, out: dict) -> None:
    """What a three-axis model adds to the number of a new token when it is given no positions."""
    tokens = out["attention_mask"].sum(dim=1, keepdim=True)
    family.base.rope_deltas = out["position_ids"].amax(dim=(0, 2))[:, None] + 1 - tokens


def _encoder_output(family: Family, encoded, features, kept, row_tokens):
    def take(parts):
        return [part[places.to(part.device)] for part, places in zip(parts, kept)]

    given = {"pooler_output": family.pooled(take(features), row_tokens)}
    if getattr(encoded, "deepstack_features", None) is not None:
        given["deepstack_features"] = [take(layer) for layer in encoded.deepstack_features]
    return type(encoded)(**given)


def _forward(model, family: Family, settings: _Settings, record: PruneRecord):
    original = model.forward
    names = [*inspect.signature(original).parameters]

    @functools.wraps(original)
    def forward(*arguments, **keywords):
        keywords |= zip(names, arguments)
        if _has_pictures(keywords):
            keywords, record.info = _prune(family, keywords, settings)
        return original(**keywords)

    return forward


def _generate(model, family: Family, settings: _Settings, record: PruneRecord, restore_prompt: bool):
    original = model.generate

    @functools.wraps(original)
    def generate(inputs=None, generation_config=None, *arguments, **keywords):
        if not _has_pictures(keywords):
            return original(inputs, generation_config, *arguments, **keywords)
        if inputs is not None:
            keywords["input_ids"] = inputs
        with torch.no_grad():
            pruned, record.info = _prune(family, keywords, settings)
        used = generation_config or model.generation_config
        _check_cache(pruned, used, settings, family)
        out = original(None, generation_config, *arguments, **_lengths(pruned, used, record.info.removed))
        if not restore_prompt:
            return out
        return _with_prompt(out, keywords["input_ids"], pruned["input_ids"].shape[1])

    return generate


def _check_cache(pruned: dict, config, settings: _Settings, family: Family) -> None:
    uses = pruned.get("use_cache")
    uses = config.use_cache if uses is None else uses
    if uses is False and settings.positions == "original" and not family.mrope and "position_ids" in pruned:
        raise StudioError("generate without a cache needs positions='compact': transformers would split at the gaps.")


def _lengths(pruned: dict, config, removed: int) -> dict:
    """Limits that count the prompt, lowered by what it lost."""
    lowered = dict(pruned)
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = pruned[name] if pruned.get(name) is not None else getattr(config, name, None)
        counted = pruned.get(instead) is None and getattr(config, instead, None) is None
        if limit and counted and removed:
            lowered[name] = max(limit - removed, 0)
    return lowered


def _with_prompt(out, prompt: torch.Tensor, length: int):
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    prompt = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), dim=0)
    sequences = torch.cat((prompt, sequences[:, length:]), dim=1)
    if isinstance(out, torch.Tensor):
        return sequences
    out.sequences = sequences
    return out
