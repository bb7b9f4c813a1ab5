"""Pruning of visual tokens on a stock transformers model, by shorter inputs.

The image is encoded once, tokens are chosen, and the image tokens that were not chosen are taken out of the prompt,
so that prefill and KV cache really shrink. The model gets its features through the public argument
`mm_encoder_outputs`; no model code is touched, and any attention backend, beams, batches, several images, labels and
static caches work.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from studio.checks import check_choice
from studio.errors import StudioError
from studio.pruning.adapters import Family, Llava, family_of, visual_tokens
from studio.pruning.blocks import block
from studio.pruning.budget import count, is_fraction
from studio.pruning.diffrate import DiffRate, with_learned
from studio.pruning.inside_model import Inside
from studio.pruning.merging import Counts, MergeRecord
from studio.pruning.registry import INSIDE, method_named
from studio.pruning.shortening import PruneInfo, PruneRecord, Settings, checked, has_images, shorten
from studio.pruning.tome import ToMe

MERGING: dict[str, type] = {"tome": ToMe, "diffrate": DiffRate}
"""The methods of `merge_tokens`."""


def prune_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    method: str,
    keep: float = 0.1,
    *,
    positions: str | None = None,
    newline: str = "row",
    reference: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[dict, PruneInfo]:
    """Encode the images of a prompt, select tokens, and shorten the prompt.

    The result goes into `model.generate(**pruned)` or `model(**pruned)` unchanged, once: transformers repeats
    `mm_encoder_outputs` in place for beams. Steps after the prefill that you make yourself need `position_ids` counted
    on from `info.next_positions`; `generate` does so.

    Args:
        model: a vision-language model of transformers (see `studio.pruning.adapters.FAMILIES`).
        inputs: what its processor returns, `labels` too; without images they come back as they are.
        method: "divprune", "hired", "globalcom2", "scope", "coverage", "cdpruner", "mmtok", "random" or "uniform"; for
            videos "evs" or "vidcom2", which leave images beside them whole.
        keep: the fraction in (0, 1] of the tokens that the language model receives for each image, newlines included,
            or a whole number of tokens; of each video likewise. 1.0 keeps everything.
        positions: "original", the tokens that stay keep their positions (as if the others were masked), or "compact",
            positions are counted anew; on three-axis models compact positions are those of text. `None` is "compact"
            for `reference` and "original" otherwise.
        newline: "row", "keep", "drop" or "compete"; see `studio.pruning.newlines`.
        reference: the authors' selection, with its own count.
        generator: for "random"; when `None`, one of seed 0 that a block of `prune` samples on from call to call.
        options: settings of the method, such as `alpha` of hired or `tau` of globalcom2; those not given are of
            `pruning` in the model's configuration, by method, or the paper's. "cdpruner" and "mmtok" read the question
            off the prompt: the text behind the last image, without special tokens.

    Returns:
        The inputs without pixels and with `mm_encoder_outputs`, and a `PruneInfo`.

    Raises:
        StudioError: settings that do not fit, a model or pair that is not supported (with the reason), videos with a
            method for images or the other way round, `inputs_embeds`, a filled cache beside new images, and a prompt
            whose image tokens do not match the images.
    """
    settings = checked(method, keep, positions, newline, reference, generator, options)
    family = family_of(model, method)
    return shorten(family, dict(inputs), settings.on(family))


@contextmanager
def prune(
    model: PreTrainedModel,
    method: str,
    keep: float = 0.1,
    *,
    positions: str | None = None,
    newline: str = "row",
    reference: bool = False,
    generator: torch.Generator | None = None,
    after_layer: int | tuple[int, ...] | None = None,
    restore_prompt: bool = True,
    **options: Any,
) -> Iterator[PruneRecord]:
    """A block in which `model.generate` and `model(...)` prune the tokens of every image, or video, they get.

        with studio.prune(model, "divprune", keep=0.1) as record:
            out = model.generate(**inputs, max_new_tokens=50)
        print(record.info.tokens_before, record.info.tokens_after)

    Logits and loss of `model(...)` are those of the shorter prompt. `max_length` and `min_length` of `generate` still
    count the whole prompt. Afterwards the model is as it was, also after an exception.

    Of nested blocks that prune on one model the innermost counts; those before and those inside the language model do
    not nest, nor do `prune` and `studio.compress`: give such a block what `prune_inputs` returns.

    A block holds for the thread or asyncio task that opened it, as `torch.no_grad` does: others use the same model at
    the same time, with blocks of their own or none. Start a thread of the block with
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)`. A deep copy made inside is
    not pruned. Models in `torch.compile`, PEFT and distributed wrappers may be given in their wrapper.

    Args:
        model, method, keep, positions, newline, reference, generator, options: as in `prune_inputs`; "fastv" and
            "pyramiddrop" too, which score tokens inside the language model, and "vscan", which also does before it.
        after_layer: k, from 1 up: k layers of the language model see every token, and those after them `keep` of each
            prompt's image tokens, chosen by the method from the hidden states there (by the last token's attention for
            "fastv", k = 2 by default, and "pyramiddrop"). Several layers cut in equal proportions, so that `keep` are
            left after the last; "pyramiddrop" does so after each quarter of the layers by default, "vscan" before the
            language model and after half of its layers. `None` prunes before the language model. Sequences and
            positions are then those of the whole prompt; go on with its cache inside the block.
        restore_prompt: whether the sequences that `generate` returns begin with the whole prompt, so that
            `out[:, inputs.input_ids.shape[1]:]` is the answer. `False` returns the short prompt, which fits the cache:
            with it and positions="compact" a conversation goes on from there, and is refused otherwise.

    Yields:
        A `PruneRecord`.

    Raises:
        StudioError: as in `prune_inputs`, or `use_cache=False` in `generate` with original positions; in `generate`,
            features in place of pixels; with `after_layer`, calls whose cache cannot be cut, such as static caches and
            assisted generation.
    """
    record = PruneRecord()
    if after_layer is not None or method in INSIDE:
        given = {"positions": positions, "reference": reference, "newline": newline, "restore_prompt": restore_prompt}
        usual = {"positions": None, "reference": False, "newline": "row", "restore_prompt": True}
        if unfit := [*options, *(name for name in usual if given[name] != usual[name])]:
            raise StudioError(f"Pruning after a layer has no {', '.join(unfit)}: leave it or after_layer out.")
        if method not in INSIDE:
            method_named(method)
        count(keep, 1)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        inside = Inside(family_of(model, method), method, keep, after_layer, generator, record)
        methods: dict[str, Callable] = {"forward": inside.forward, "generate": inside.generate}
        if method == "vscan":
            settings = Settings(method, _first_share(keep), "original", newline, False, generator, {})
            inside.first = PruneRecord()
            first = {
                "forward": _forward(inside.family, settings, inside.first),
                "generate": _generate(inside.family, settings, inside.first, restore_prompt),
            }
            methods = {name: _both(first[name], second) for name, second in methods.items()}
        with inside.hooks(), block(inside.family.model, methods, "studio.prune inside the language model"):
            yield record
        return
    family = family_of(model, method)
    settings = checked(method, keep, positions, newline, reference, generator, options).on(family)
    methods = {
        "forward": _forward(family, settings, record),
        "generate": _generate(family, settings, record, restore_prompt),
    }
    with block(family.model, methods, "studio.prune before the language model"):
        yield record


@contextmanager
def merge_tokens(
    model: PreTrainedModel,
    merged: Counts | None = None,
    *,
    pruned: Counts | None = None,
    rank: str | None = None,
    method: str = "tome",
) -> Iterator[MergeRecord]:
    """Within the block, tokens go while the vision tower reads an image, so that it is faster.

    The language model gets as many tokens as before: combine it with a block of `prune` for fewer. A block affects
    only the thread or task that opened it. Of nested blocks on one model the innermost counts.

    Args:
        model: of the LLaVA families, with a CLIP or SigLIP tower.
        merged: tokens of an image or crop that are merged into others in the first layer of the tower, the second, and
            so on, behind attention; one number is that of each layer up to the one that features come from.
        pruned: tokens that are left out there, likewise.
        rank: which tokens go first, those that get little "attention", or those whose "likeness" to another one is
            great; by default as learned for the model, else "attention".
        method: "tome" (arXiv:2210.09461) merges tokens that resemble one another, and takes neither `pruned` nor
            `rank`; "diffrate" (arXiv:2305.17997) takes all three, and without numbers those learned for the model.

    Yields:
        A `MergeRecord`: how many tokens were left of the latest image.

    Raises:
        StudioError: a model of another family, more tokens than there are, flash attention, an unknown method, or no
            numbers where none were learned; in the block, calls with a `vision_feature_layer` of their own, and
            training with gradient checkpointing.
    """
    check_choice("The method that merges tokens", method, MERGING)
    family = family_of(model, method)
    if not isinstance(family, Llava) or (reason := family.refusal(method)):
        reason = reason if isinstance(family, Llava) else "its tower is not one of CLIP or SigLIP as LLaVA has it"
        raise StudioError(f"Tokens inside the tower of this {model.config.model_type} model stay: {reason}.")
    given = {"merged": merged, "pruned": pruned, "rank": rank}
    given = {name: value for name, value in given.items() if value is not None}
    if method == "tome" and given.keys() != {"merged"}:
        raise StudioError("tome takes the numbers of merged tokens and nothing else: add method='diffrate' for more.")
    if method == "diffrate":
        given = with_learned(family.model, given)
    tower = family.base.vision_tower
    merging: Any = MERGING[method]
    layers = family.model.config.vision_feature_layer
    feature_layer = layers if isinstance(layers, int) else layers[-1]
    has_cls = tower.config.model_type == "clip_vision_model"
    in_tower = merging(tower, **given, has_cls=has_cls, feature_layer=feature_layer)
    with in_tower.hooks(family.base.multi_modal_projector) as record:
        yield record


def _first_share(keep: float) -> float:
    """The share that the first of two equal cuts leaves.

    Raises:
        StudioError: a number of tokens.
    """
    if not is_fraction(keep):
        raise StudioError("vscan cuts twice and needs a fraction to keep, not a number of tokens.")
    return keep**0.5


def _both(first: Callable, second: Callable) -> Callable:
    """A method of the model that shortens the prompt first and cuts again inside the language model."""

    def method(original, *arguments, **keywords):
        @functools.wraps(original)
        def rest(*given, **more):
            return second(original, *given, **more)

        return first(rest, *arguments, **keywords)

    return method


def _forward(family: Family, settings: Settings, record: PruneRecord):
    def forward(original, *arguments, **keywords):
        keywords |= zip(inspect.signature(original).parameters, arguments)
        if has_images(keywords):
            keywords, record.info = shorten(family, keywords, settings)
        elif keywords.get("mm_encoder_outputs") and not hasattr(family.model, "generate"):
            raise StudioError("Features in place of pixels are not pruned: open the block on the model that generates.")
        return original(**keywords)

    return forward


def _generate(family: Family, settings: Settings, record: PruneRecord, restore_prompt: bool):
    def generate(original, inputs=None, generation_config=None, *arguments, **keywords):
        if not has_images(keywords):
            ids = keywords.get("input_ids") if inputs is None else inputs
            if ids is not None:
                _check_unpruned(family, ids, keywords, settings, restore_prompt)
            return original(inputs, generation_config, *arguments, **keywords)
        if inputs is not None:
            keywords["input_ids"] = inputs
        configs = [config for config in (generation_config, family.model.generation_config) if config is not None]
        if keywords.get("attention_mask") is None and keywords.get("input_ids") is not None:
            keywords["attention_mask"] = _inferred_mask(keywords["input_ids"], keywords, configs)
        with torch.no_grad():
            pruned, info = shorten(family, keywords, settings)
        record.info = info
        _check_cache(pruned, configs, settings, family)
        out = original(None, generation_config, *arguments, **_lengths(pruned, configs, info.removed))
        if not restore_prompt:
            return out
        return _with_prompt(out, keywords["input_ids"], pruned["input_ids"].shape[1])

    return generate


def _check_unpruned(family: Family, ids: torch.Tensor, given: dict, settings: Settings, restore_prompt: bool) -> None:
    """Refuse a call without pixels in whose image tokens the model would read something else.

    Raises:
        StudioError: features in place of pixels, or a conversation that goes on at other places than its cache.
    """
    image = visual_tokens(family.model, ids)
    whole = is_fraction(settings.keep) and settings.keep == 1
    if given.get("mm_encoder_outputs") and image.any() and not whole:
        raise StudioError("Features in place of pixels are not pruned: give pixels, or generate outside the block.")
    cache = given.get("past_key_values")
    held = 0 if cache is None else cache.get_seq_length()
    moved = not whole and (restore_prompt or (settings.positions == "original" and not family.mrope))
    if held and (image[:, held:].any() or (moved and image.any())):
        raise StudioError(
            "A conversation goes on from the cache of a pruned prompt with restore_prompt=False and "
            "positions='compact' only: give prune both, or give the whole prompt with its pixels and without a cache."
        )


def _inferred_mask(ids: torch.Tensor, given: dict, configs: list) -> torch.Tensor:
    """(B, L) long: the attention mask as `generate` of transformers makes it where none is given."""
    pad, ends = (_wanted(f"{name}_token_id", given, configs) for name in ("pad", "eos"))
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        return torch.ones_like(ids)
    return ids.ne(pad).long()


def _wanted(name: str, given: dict, configs: list):
    """A setting as transformers finds it: an argument, or the first configuration that has one."""
    values = (given.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _check_cache(pruned: dict, configs: list, settings: Settings, family: Family) -> None:
    gaps = settings.positions == "original" and not family.mrope and "position_ids" in pruned
    if gaps and settings.method != "vscan" and _wanted("use_cache", pruned, configs) is False:
        raise StudioError("generate without a cache needs positions='compact': transformers would split at the gaps.")


def _lengths(pruned: dict, configs: list, removed: int) -> dict:
    """Limits that count the prompt, lowered by what it lost."""
    lowered = dict(pruned)
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = _wanted(name, pruned, configs)
        if limit and removed and _wanted(instead, pruned, configs) is None:
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
