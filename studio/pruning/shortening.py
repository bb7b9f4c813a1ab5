"""Shorter inputs for a vision-language model: encode its images, select tokens, remove the others from the prompt.

`cut` removes tokens: from ids, masks, labels and positions, with new padding.
"""

import inspect
import time
from dataclasses import dataclass, field

import torch

from studio.checks import shown
from studio.errors import StudioError
from studio.pruning.adapters import Family, mismatch
from studio.pruning.layout import Layout, check_newline, count, is_fraction
from studio.pruning.registry import SCORES, WITH_REFERENCE, method_named

_FILL = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}
"""What padding holds in each input that is as long as the prompt."""


def attention_mask_of(inputs: dict) -> torch.Tensor:
    """(B, L) long: the attention mask, all ones when none is given.

    Raises:
        StudioError: another shape.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise StudioError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, not {tuple(mask.shape)}."
        )
    return mask.long()


def cut(inputs: dict, keep: torch.Tensor, pad_token_id: int) -> dict:
    """The inputs with only the tokens that `keep` (B, L) marks, padded again to the longest row.

    Padding goes where it was: to the right when a row ended in padding, otherwise to the left.

    Args:
        inputs: `input_ids` and `attention_mask`, both (B, L), and whatever else goes with them.
        keep: bool, false for padding; a masked image token that stays keeps its mask.
        pad_token_id: the id in the padding.

    Returns:
        A new dict; entries that are not as long as the prompt are the same objects.
    """
    longest = int(keep.sum(dim=1).max())
    if bool((inputs["attention_mask"][:, -1] == 0).any()):
        order = torch.argsort(keep.int(), dim=1, descending=True, stable=True)[:, :longest]
    else:
        order = torch.argsort(keep.int(), dim=1, stable=True)[:, -longest:]
    real = keep.gather(1, order)
    out = dict(inputs)
    for name, fill in {"input_ids": pad_token_id, **_FILL}.items():
        value = inputs.get(name)
        if value is not None and value.shape[-2:] == keep.shape:
            taken = value.gather(-1, order.to(value.device).expand(*value.shape[:-1], longest))
            out[name] = taken.masked_fill(~real.to(value.device), fill)
    return out


def positions_from(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) positions as transformers counts them: real tokens from 0 up, padding at 0."""
    return (mask.long().cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)


POSITIONS = ("original", "compact")
_TOWER_STATES = ("last_hidden_state", "hidden_states", "attentions")
_OWN = ("features", "budget", "attention", "layout", "generator", "newline", "reference")


@dataclass(frozen=True, eq=False)
class PruneInfo:
    """What was pruned; lists have one entry for each image, in the order of the prompt.

    Args:
        method, keep: as given.
        tokens_before, tokens_after: tokens the language model receives for the image, newlines included.
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
    """What `prune` yields: `info` of the latest call with images, `None` before the first."""

    info: PruneInfo | None = None


@dataclass(frozen=True)
class Settings:
    """How to prune; made by `checked`."""

    method: str
    keep: float
    positions: str
    newline: str
    reference: bool
    generator: torch.Generator
    options: dict


def checked(
    method: str,
    keep: int | float,
    positions: str | None,
    newline: str,
    reference: bool,
    generator: torch.Generator | None,
    options: dict,
) -> Settings:
    """Settings with their defaults filled in.

    Raises:
        StudioError: what is unknown or does not fit together.
    """
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
        raise StudioError(f"positions is one of {', '.join(POSITIONS)}, not {shown(positions)}.")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return Settings(method, keep, positions, newline, reference, generator, options)


def has_images(inputs: dict) -> bool:
    """Whether there are pixels to encode, or features that a caller may have put in their place."""
    embeds = inputs.get("inputs_embeds")
    pixels = (inputs.get("pixel_values"), inputs.get("pixel_values_videos"))
    return any(given is not None for given in pixels) or (embeds is not None and embeds.shape[1] > 1)


@torch._disable_dynamo
def shorten(family: Family, inputs: dict, settings: Settings) -> tuple[dict, PruneInfo]:
    """The inputs without pixels and without the tokens that were not chosen, and what was pruned.

    Inputs without images come back as they are.

    Raises:
        StudioError: as in `studio.pruning.api.prune_inputs`.
    """
    if not has_images(inputs):
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
    if inputs.get("input_ids") is None or inputs.get("inputs_embeds") is not None:
        raise StudioError("Give input_ids and pixels: the image tokens of inputs_embeds cannot be told from text.")
    if inputs.get("pixel_values_videos") is not None:
        raise StudioError("Only images are pruned: give videos to the model outside of the block.")
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise StudioError("Give all images with the first prompt: new ones cannot be pruned after a filled cache.")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _choose(family, tap, inputs, features, layouts, settings: Settings) -> list[torch.Tensor]:
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

    given = {name: value for name, value in encoded.items() if name not in _TOWER_STATES}
    given["pooler_output"] = family.pooled(take(features), row_tokens)
    if "deepstack_features" in given:
        given["deepstack_features"] = [take(layer) for layer in encoded.deepstack_features]
    return type(encoded)(**given)
