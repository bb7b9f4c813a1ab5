"""Shorter inputs for a vision-language model: encode its images, select tokens, remove the others from the prompt.

`cut` removes tokens: from ids, masks, labels and positions, with new padding.
"""

import inspect
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from studio.checks import shown
from studio.errors import StudioError
from studio.pruning.adapters import Family, mismatch, visual_tokens
from studio.pruning.budget import count, is_fraction
from studio.pruning.layout import Layout
from studio.pruning.newlines import check_newline
from studio.pruning.registry import READS_TEXT, SCORES, SELECTORS, VIDEO, WITH_REFERENCE, method_named
from studio.pruning.vscan import merged

_FILL = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}
"""What padding holds in each input that is as long as the prompt."""


def attention_mask_of(inputs: dict) -> torch.Tensor:
    """(B, L) long: the attention mask, all ones when none is given.

    Raises:
        StudioError: no tensor, or another shape.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids)
    if not isinstance(mask, torch.Tensor):
        raise StudioError(f"attention_mask must be a tensor of the shape of input_ids, not a {type(mask).__name__}.")
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
_OWN = ("features", "budget", "attention", "layout", "generator", "newline", "reference", "frames", "text")


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

    @property
    def latest(self) -> PruneInfo:
        """`info`, where a call with images was made."""
        assert self.info is not None
        return self.info


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

    def on(self, family: Family) -> "Settings":
        """These, with the options that the model's configuration has for the method and nobody has given."""
        own = (getattr(family.model.config, "pruning", None) or {}).get(self.method, {})
        return self if self.reference else replace(self, options={**own, **self.options})

    def needs(self, family: Family) -> tuple[str, ...]:
        """The fields of `Attention` that are read off the vision tower."""
        if self.method == "divprune" and self.options.get("centred") and family.mrope:
            return ("unmerged",)
        if self.method == "globalcom2" and self.options.get("scores") == "feature":
            return ("last",)
        return SCORES.get(self.method, ())


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
    if method in VIDEO and newline != "row":
        raise StudioError(f"{method} keeps the newline of a video: leave newline out.")
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


@dataclass(frozen=True)
class _Modality:
    name: str
    pixels: str


_IMAGES, _VIDEOS = _Modality("image", "pixel_values"), _Modality("video", "pixel_values_videos")


@dataclass
class _Read:
    """What the vision tower gives for the images or the videos of a prompt, and what of it stays."""

    modality: _Modality
    mask: torch.Tensor
    encoded: Any
    features: list[torch.Tensor]
    layouts: list[Layout]
    kept: list[torch.Tensor]
    names: list[str]
    seconds: dict[str, float]


@torch._disable_dynamo
def shorten(family: Family, inputs: dict, settings: Settings) -> tuple[dict, PruneInfo]:
    """The inputs without pixels and without the tokens that were not chosen, and what was pruned.

    Inputs without images and videos come back as they are. Images beside a video keep all their tokens.

    Raises:
        StudioError: as in `studio.pruning.api.prune_inputs`.
    """
    if not has_images(inputs):
        return inputs, PruneInfo(settings.method, settings.keep)
    _check_inputs(inputs, settings)
    ids = inputs["input_ids"]
    present = [modality for modality in (_IMAGES, _VIDEOS) if inputs.get(modality.pixels) is not None]
    read = [_read(family, modality, inputs, settings) for modality in present]
    names = {name for part in read for name in part.names}
    keep = torch.ones_like(ids, dtype=torch.bool)
    for part in read:
        stays = [torch.isin(torch.arange(len(each)), places) for each, places in zip(part.features, part.kept)]
        keep[part.mask] = torch.cat(stays).to(ids.device)
    positions = _positions(family, inputs)
    grids = {name: inputs[name] for name in _GRIDS if name in inputs}
    out = {name: value for name, value in inputs.items() if name not in {*names, *grids}}
    if not keep.all():
        out = _shorter(family, out, keep, positions, settings.positions)
        positions = out["position_ids"]
    elif family.mrope:
        out |= grids
    out["mm_encoder_outputs"] = {part.modality.name: _encoder_output(family, part, keep) for part in read}
    pruned = read[-1]
    info = PruneInfo(
        method=settings.method,
        keep=settings.keep,
        tokens_before=[len(part) for part in pruned.features],
        tokens_after=[len(places) for places in pruned.kept],
        kept=pruned.kept,
        layouts=pruned.layouts,
        removed=ids.shape[1] - out["input_ids"].shape[1],
        next_positions=(positions[-3:] if family.mrope else positions[None]).amax(dim=(0, 2)) + 1,
        seconds={phase: sum(part.seconds[phase] for part in read) for phase in pruned.seconds},
    )
    return out, info


_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Inputs that say where the tokens of an image or a video lie: of no use once positions are known."""


def _read(family: Family, modality: _Modality, inputs: dict, settings: Settings) -> _Read:
    """Encodes the images or the videos of a prompt and chooses among their tokens."""
    ids, encode = inputs["input_ids"], getattr(family.base, f"get_{modality.name}_features")
    given = _encoder_inputs(encode, inputs)
    images = modality is _IMAGES
    started = now(ids.device)
    with family.tap(settings.needs(family), inputs) if images else nullcontext() as tap:
        encoded = encode(**given, return_dict=True)
    features = family.features(encoded, inputs) if images else list(encoded.pooler_output)
    mask = ids == getattr(family.model.config, f"{modality.name}_token_id")
    if int(mask.sum()) != sum(map(len, features)):
        raise StudioError(mismatch(int(mask.sum()), sum(map(len, features)), modality.name))
    encoded_at = now(ids.device)
    layouts = family.layouts(features, inputs) if images and settings.method not in VIDEO else []
    if settings.method in VIDEO:
        kept = _choose_frames(family, inputs, features, settings, whole=images)
    else:
        kept = _choose(family, tap, inputs, features, layouts, settings)
    if settings.method == "vscan":
        features = [merged(*part) for part in zip(features, kept, layouts)]
    seconds = {"encode": encoded_at - started, "select": now(ids.device) - encoded_at}
    return _Read(modality, mask, encoded, features, layouts, kept, [*given], seconds)


def _choose_frames(family: Family, inputs: dict, features: list, settings: Settings, whole: bool) -> list[torch.Tensor]:
    if whole or (is_fraction(settings.keep) and settings.keep == 1):
        return [torch.arange(len(part)) for part in features]
    kept = []
    for part, frames in zip(features, family.frames(features, inputs)):
        content = len(part) // frames * frames
        places = method_named(settings.method)(part[:content], settings.keep, frames=frames).cpu()
        kept.append(torch.cat((places, torch.arange(content, len(part)))))
    return kept


def _encoder_inputs(encode: Callable, inputs: dict) -> dict:
    names = inspect.signature(encode).parameters
    return {name: inputs[name] for name in names if name != "kwargs" and name in inputs}


def _check_inputs(inputs: dict, settings: Settings) -> None:
    if inputs.get("input_ids") is None or inputs.get("inputs_embeds") is not None:
        raise StudioError("Give input_ids and pixels: the image tokens of inputs_embeds cannot be told from text.")
    videos = inputs.get("pixel_values_videos") is not None
    if videos and settings.method not in VIDEO:
        raise StudioError(f"{settings.method} prunes images: for videos use {' or '.join(VIDEO)}.")
    if not videos and settings.method in VIDEO:
        raise StudioError(f"{settings.method} prunes videos, and there are only images: use divprune.")
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise StudioError("Give all images with the first prompt: new ones cannot be pruned after a filled cache.")


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _choose(family, tap, inputs, features, layouts, settings: Settings) -> list[torch.Tensor]:
    if is_fraction(settings.keep) and settings.keep == 1:
        return [torch.arange(len(part)) for part in features]
    scores = family.scores(tap, inputs, len(features)) if settings.needs(family) else [None] * len(features)
    texts = _texts(family, inputs, features) if settings.method in READS_TEXT else [{}] * len(features)
    given = {"newline": settings.newline, **settings.options}
    if settings.reference:
        given["reference"] = True
    select = SELECTORS[settings.method]
    return [
        select(part, settings.keep, attention=score, layout=layout, generator=settings.generator, **text, **given).cpu()
        if len(part)
        else torch.arange(0)
        for part, score, layout, text in zip(features, scores, layouts, texts)
    ]


def _texts(family: Family, inputs: dict, features: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """For each image the embeddings of the text behind the last image of its prompt, without padding and ends."""
    ids, config = inputs["input_ids"], family.model.config.get_text_config()
    ends = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = torch.tensor(
        [end for each in ends for end in (each if isinstance(each, list) else [each]) if end is not None]
    )
    image = visual_tokens(family.model, ids)
    behind = image.flip(1).cumsum(dim=1).flip(1) == 0
    asked = behind & attention_mask_of(inputs).bool() & ~torch.isin(ids, special.to(ids.device))
    embed, texts = family.model.get_input_embeddings(), []
    row, left = -1, 0
    for part in features:
        while not left:
            row, left = row + 1, int(image[row + 1].sum())
        texts.append({"text": embed(ids[row][asked[row]])})
        left -= len(part)
    return texts


def _positions(family: Family, inputs: dict) -> torch.Tensor:
    """Positions of the whole prompt: (B, L), or (3, B, L) with three axes."""
    given, mask = inputs.get("position_ids"), attention_mask_of(inputs)
    if given is not None:
        given = given if given.dim() == 3 else given.expand(mask.shape)
        return _on_three_axes(given) if family.mrope else given
    if not family.mrope:
        return positions_from(mask)
    ids = inputs["input_ids"]
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        config = family.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    grids = {name: inputs[name] for name in _GRIDS if inputs.get(name) is not None}
    return family.base.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)[0]


def _shorter(family: Family, inputs: dict, keep, positions, kind: str) -> dict:
    """The inputs without the tokens that go. The mask is always there: without one, transformers takes a gap in the
    positions for the start of another sequence.
    """
    pad = family.model.config.get_text_config().pad_token_id
    mask, image = attention_mask_of(inputs), visual_tokens(family.model, inputs["input_ids"])
    keep = keep & (mask.bool() | image)
    out = cut({**inputs, "attention_mask": mask, "position_ids": positions}, keep, 0 if pad is None or pad < 0 else pad)
    text = positions_from(out["attention_mask"])
    if kind == "compact":
        out["position_ids"] = _on_three_axes(text) if family.mrope else text
    if family.mrope:
        _set_rope_deltas(family, out)
        out["position_ids"] = torch.cat((text[None], out["position_ids"]))
    return out


def _on_three_axes(positions: torch.Tensor) -> torch.Tensor:
    """(3, B, L) positions, of those of text (B, L), or without the positions of text that may lie before the three."""
    return positions.expand(3, -1, -1) if positions.dim() == 2 else positions[-3:]


def _set_rope_deltas(family: Family, out: dict) -> None:
    """What a three-axis model adds to the number of a new token when it is given no positions."""
    tokens = out["attention_mask"].sum(dim=1, keepdim=True)
    family.base.rope_deltas = out["position_ids"].amax(dim=(0, 2))[:, None] + 1 - tokens


def _encoder_output(family: Family, part: _Read, keep: torch.Tensor) -> Any:
    def take(parts):
        return [each[places.to(each.device)] for each, places in zip(parts, part.kept)]

    given = {name: value for name, value in part.encoded.items() if name not in _TOWER_STATES}
    kept = take(part.features)
    row_tokens = (keep & part.mask).sum(dim=1).tolist()
    given["pooler_output"] = family.pooled(kept, row_tokens) if part.modality is _IMAGES else family.pooled_videos(kept)
    if "deepstack_features" in given:
        given["deepstack_features"] = [take(layer) for layer in part.encoded.deepstack_features]
    return type(part.encoded)(**given)
