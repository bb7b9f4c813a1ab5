"""Pruning after layer k of the language model: the first layers see every token, the others a few.

- `fastv`: "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv:2403.06764). Score: the attention of the
  prompt's last token in the layer before the cut, mean over heads.
- `pyramiddrop`: "PyramidDrop" (CVPR 2025, arXiv:2410.17247). Several cuts, each by the last token's attention in the
  layer after it, over all tokens that are still there.
- `vscan`: "VScan" (arXiv:2505.22654): one cut halfway, of tokens that `studio.pruning.vscan` has chosen and merged
  before the language model.
- any selector that needs features alone, which are here the hidden states before the cut.

Only the last token's row of attention is computed, so any attention backend works. Tokens keep their positions, rows of
a batch may be padded, and layers after a cut have shorter caches (`ShortLayer`). Transformers makes one mask for all
layers, as wide as the longest; each layer takes its own columns of it.
"""

import inspect
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from studio.checks import shown
from studio.errors import StudioError
from studio.pruning.adapters import Family, visual_tokens
from studio.pruning.blocks import with_keywords
from studio.pruning.budget import count, is_fraction
from studio.pruning.columns import Columns, ShortLayer
from studio.pruning.registry import INSIDE, METHODS, READS_TEXT, SCORES, VIDEO
from studio.pruning.shortening import PruneInfo, PruneRecord, attention_mask_of

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""The layers of a cache that can be cut: within their window the second are like the first."""
_GROWS = "This block needs a cache that grows"
_REFUSED = {
    _GROWS: ("cache_implementation", "prefill_chunk_size"),
    "A cache that was cut cannot take back the drafts of assisted generation": (
        "assistant_model",
        "prompt_lookup_num_tokens",
        "assistant_early_exit",
        "use_mtp",
    ),
}
"""Arguments of `generate`, by the reason why they do not fit a cache that is cut."""
_CALL: ContextVar["Call | None"] = ContextVar("call", default=None)


def cuts_of(family: Family, method: str, keep: float, after_layer: int | tuple[int, ...] | None) -> dict[int, float]:
    """For each layer that is entered by fewer tokens, the share of all tokens, or their number.

    Several cuts leave equal shares of what reached them, so that `keep` are left after the last.

    Raises:
        StudioError: layers that the model does not have or after which tokens cannot be cut.
    """
    layers = len(layers_of(family))
    if after_layer is None:
        quarters = tuple(layers * part // 4 for part in (1, 2, 3))
        after_layer = {"pyramiddrop": quarters, "vscan": (max(layers // 2, 1),)}.get(method, (2,))
    cuts = tuple(after_layer) if isinstance(after_layer, tuple | list) else (after_layer,)
    whole = all(isinstance(cut, Integral) and not isinstance(cut, bool) and 0 < cut < layers for cut in cuts)
    if not cuts or not whole or list(cuts) != sorted(set(cuts)):
        raise StudioError(
            f"after_layer is a layer from 1 to {layers - 1}, or several in ascending order, not {shown(after_layer)}."
        )
    cuts = tuple(int(cut) for cut in cuts)
    if len(cuts) > 1 and not is_fraction(keep):
        raise StudioError("Several cuts need a fraction to keep, not a number of tokens.")
    windowless(family)
    deep = len(getattr(family.model.config.vision_config, "deepstack_visual_indexes", None) or ())
    if cuts[0] < deep:
        raise StudioError(f"The first {deep} layers are given features: choose after_layer={deep} or more.")
    return {cut: keep ** (stage / len(cuts)) if len(cuts) > 1 else keep for stage, cut in enumerate(cuts, start=1)}


def windowless(family: Family) -> None:
    """Refuse a model whose layers see a window of the prompt.

    Raises:
        StudioError: a layer with sliding or chunked attention.
    """
    text = family.model.config.get_text_config()
    if any("sliding" in kind or "chunked" in kind for kind in getattr(text, "layer_types", None) or ()):
        raise StudioError(f"{family.model.config.model_type} has layers with a window: prune before the model instead.")


def layers_of(family: Family) -> torch.nn.ModuleList:
    """The decoder layers of the language model."""
    return (getattr(family.base, "language_model", None) or family.base.text_model).layers


def with_short_mask(number: int, arguments: tuple, keywords: dict) -> dict:
    """What a decoder layer is called with when its cache may hold fewer tokens than its mask tells of."""
    cache = keywords.get("past_key_values")
    layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
    if not isinstance(layer, ShortLayer):
        return keywords
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    return {**keywords, "attention_mask": layer.mask(keywords.get("attention_mask"), hidden.shape[1])}


class Inside:
    """The cuts of one block of `prune`: `forward` and `generate` of the model, and hooks on its layers."""

    def __init__(
        self,
        family: Family,
        method: str,
        keep: float,
        after_layer: int | tuple[int, ...] | None,
        generator: torch.Generator,
        record: PruneRecord,
    ):
        if method in SCORES and method not in INSIDE:
            raise StudioError(f"{method} needs scores of the vision tower: use it without after_layer.")
        if method in VIDEO or method in READS_TEXT:
            raise StudioError(f"{method} chooses before the language model: use it without after_layer.")
        self.family, self.method, self.keep, self.record = family, method, keep, record
        self.generator, self.cuts = generator, cuts_of(family, method, keep, after_layer)
        self.check_queries(method in INSIDE)
        self.call: type[Call] = CuttingCall
        self.first: PruneRecord | None = None

    def check_queries(self, needed: bool) -> None:
        """Refuse a model whose queries cannot be read, where a method needs them.

        Raises:
            StudioError: attention is needed and the model has no plain projection of queries.
        """
        text: Any = self.family.model.config.get_text_config()
        attention: Any = layers_of(self.family)[0].self_attn
        width = getattr(getattr(attention, "q_proj", None), "out_features", None)
        if needed and width != text.num_attention_heads * attention.head_dim:
            raise StudioError(f"{self.method} cannot read the queries of {self.family.model.config.model_type} models.")

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self.handles():
                stack.callback(handle.remove)
            yield

    def handles(self) -> Iterator[RemovableHandle]:
        """Hooks on the layers, put in place one by one."""
        for number, layer in enumerate(layers_of(self.family)):
            yield layer.register_forward_pre_hook(with_keywords(self._enter(number), 2), with_kwargs=True)

    def current(self) -> "Call | None":
        """The call that runs in this context, if it is of this block."""
        call = _CALL.get()
        return call if call is not None and call.inside is self else None

    def _enter(self, number: int):
        def hook(layer, arguments, keywords):
            call = self.current()
            if call is not None:
                return call.enter(number, arguments, keywords)

        return hook

    def generate(
        self,
        original: Callable,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *arguments: Any,
        **keywords: Any,
    ) -> Any:
        given = keywords | dict(zip(inspect.signature(original).parameters, (inputs, generation_config, *arguments)))
        configs = [config for config in (generation_config, self.family.model.generation_config) if config is not None]
        for reason, names in _REFUSED.items():
            for name in names:
                values = [given.get(name), *(getattr(config, name, None) for config in configs)]
                if any(value is not None and value is not False for value in values):
                    raise StudioError(f"{reason}: leave out {name}.")
        return original(inputs, generation_config, *arguments, **keywords)

    def forward(self, original: Callable, *arguments: Any, **keywords: Any) -> Any:
        keywords |= zip(inspect.signature(original).parameters, arguments)
        call = self.call(self, keywords)
        outer = _CALL.set(call)
        try:
            out = original(**keywords)
        finally:
            _CALL.reset(outer)
        call.finish()
        return out


class Call(ABC):
    """One call of the model: a prompt with images, or what follows it."""

    def __init__(self, inside: Inside, keywords: dict):
        self.inside: Any = inside
        self.cache: Any = keywords.get("past_key_values")
        ids = keywords.get("input_ids")
        self.image: Any = None  # (B, L) bool, the image tokens of a prompt
        if self.cache is not None and self.cache.get_seq_length():
            if any(keywords.get(pixels) is not None for pixels in ("pixel_values", "pixel_values_videos")):
                raise StudioError(
                    "Give all images with the first prompt: new ones cannot be pruned after a filled cache."
                )
            return
        if ids is None:
            raise StudioError("Give input_ids: the image tokens of inputs_embeds cannot be told from text.")
        image = visual_tokens(inside.family.model, ids)
        self.image = image if image.any() else None
        if self.image is None:
            return
        if keywords.get("labels") is not None:
            raise StudioError("Labels do not fit the shorter logits: prune before the model, without after_layer.")
        if any(type(layer) not in _GROWING for layer in getattr(self.cache, "layers", ())):
            raise StudioError(f"{_GROWS}: leave out past_key_values, or give an empty DynamicCache.")
        self.valid = attention_mask_of(keywords).bool()
        self.total = [int(row.sum()) for row in image]
        self.last = torch.where(self.valid, torch.arange(ids.shape[1], device=ids.device), -1).argmax(dim=1)

    def enter(self, number: int, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        """What a decoder layer is called with."""
        if self.image is None:
            return arguments, with_short_mask(number, arguments, keywords)
        self.cache = keywords.get("past_key_values")
        if self.cache is None:
            raise StudioError(
                "This block needs a cache: leave out use_cache=False, and gradient checkpointing in training."
            )
        return self.cut(number, arguments, keywords)

    @abstractmethod
    def cut(self, number: int, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        """What decoder layer `number` is called with while the prompt is read."""

    @abstractmethod
    def finish(self) -> None:
        """What is left to do when the model has been called."""


class CuttingCall(Call):
    """A call in which layers after a cut are entered by fewer tokens."""

    def __init__(self, inside: Inside, keywords: dict):
        super().__init__(inside, keywords)
        self.columns: Any = None  # `Columns` after the first cut
        self.query: Any = None
        self.after: dict[int, Columns] = {}
        self.masks: dict[int, tuple] = {}
        self.seconds = 0.0
        first = inside.first
        self.earlier = first.info if first is not None and self.image is not None else None
        if first is not None and self.earlier is not None:
            first.info = None
            self.prompts = by_prompt(self.earlier, self.total)
            self.whole = [tokens for _, tokens in self.prompts]
        elif self.image is not None:
            self.whole = self.total

    def cut(self, number: int, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        rotary = keywords["position_embeddings"]
        if number + 1 in self.inside.cuts and self.inside.method == "fastv":
            self.query = self._last_query(number, hidden, rotary)
        if number in self.inside.cuts:
            started = time.perf_counter()
            chosen = Columns.where(self._keep(number, hidden, rotary))
            hidden = chosen.take(hidden)
            self.columns = chosen if self.columns is None else chosen.among(self.columns)
            self.last = torch.full_like(self.last, hidden.shape[1] - 1)
            self.seconds += time.perf_counter() - started
        if self.columns is None:
            return arguments, keywords
        self.after[number] = self.columns
        keywords = {**keywords, **self._shorter(keywords)}
        if arguments:
            return (hidden, *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": hidden}

    def _shorter(self, keywords: dict) -> dict:
        columns, mask = self.columns, keywords.get("attention_mask")
        if id(columns) not in self.masks:
            rotary = tuple(columns.take(table) for table in keywords["position_embeddings"])
            self.masks = {id(columns): (columns.mask(mask), rotary)}
        mask, rotary = self.masks[id(columns)]
        return {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}

    def _keep(self, number: int, hidden: torch.Tensor, rotary) -> torch.Tensor:
        """(B, n) bool: which of the columns that reach a layer enter it."""
        image, valid = self.image, self.valid
        if self.columns is not None:
            image, valid = image.gather(1, self.columns.order), self.columns.real
            rotary = tuple(self.columns.take(table) for table in rotary)
        image, keep = image & valid, valid & ~image
        scores = self._scores(number, hidden, rotary, valid) if self.inside.method in INSIDE else None
        for row, places in enumerate(image):
            places = places.nonzero().flatten()
            if not len(places):
                continue
            wanted = min(count(self.inside.cuts[number], self.whole[row]), len(places))
            if scores is not None:
                chosen = scores[row, places].argsort(descending=True, stable=True)[:wanted]
            else:
                select = METHODS[self.inside.method]
                chosen = select(hidden[row, places], wanted, generator=self.inside.generator)
            keep[row, places[chosen.to(places.device)]] = True
        return keep

    def _scores(self, number: int, hidden, rotary, valid) -> torch.Tensor:
        """(B, n) float32: the attention of the last token, mean over heads."""
        if self.inside.method == "fastv":
            query, keys = self.query, self.cache.layers[number - 1].keys
        else:
            query, keys = self._last_query(number, hidden, rotary), self._project(number, hidden, rotary, "k")
        groups = query.shape[1] // keys.shape[1]
        query = query.float().unflatten(1, (-1, groups)).squeeze(3)
        attention: Any = layers_of(self.inside.family)[number].self_attn
        logits = torch.einsum("bhgd,bhnd->bhgn", query * attention.scaling, keys.float())
        return logits.masked_fill(~valid[:, None, None], float("-inf")).softmax(dim=-1).mean(dim=(1, 2))

    def _last_query(self, number: int, hidden, rotary) -> torch.Tensor:
        """(B, heads, 1, D), rotated."""
        at = self.last[:, None, None]

        def take(table):
            table = table.expand(len(hidden), -1, -1)
            return table.gather(1, at.expand(-1, -1, table.shape[-1]))

        if self.columns is not None and rotary[0].shape[1] != hidden.shape[1]:
            rotary = tuple(self.columns.take(table) for table in rotary)
        return self._project(number, take(hidden), tuple(map(take, rotary)), "q")

    def _project(self, number: int, hidden, rotary, part: str) -> torch.Tensor:
        layer: Any = layers_of(self.inside.family)[number]
        return rotated(layer.self_attn, layer.input_layernorm(hidden), rotary, part)

    def finish(self) -> None:
        """Gives layers after a cut caches that know what they lack."""
        if self.image is None:
            return
        prompt = self.image.shape[1]
        for number, columns in self.after.items():
            layer = self.cache.layers[number]
            self.cache.layers[number] = ShortLayer(layer.keys, layer.values, columns.real, prompt)
        columns = self.columns
        kept = [
            (image.cumsum(0) - 1)[order[real & image[order]]].cpu()
            for image, order, real in zip(self.image, columns.order, columns.real)
        ]
        info = PruneInfo(
            method=self.inside.method,
            keep=self.inside.keep,
            tokens_before=self.total,
            tokens_after=list(map(len, kept)),
            kept=kept,
            seconds={"encode": 0.0, "select": self.seconds},
        )
        if self.earlier is not None:
            kept = [places[left] for (places, _), left in zip(self.prompts, kept)]
            seconds = {phase: spent + self.earlier.seconds[phase] for phase, spent in info.seconds.items()}
            info = replace(info, tokens_before=self.whole, kept=kept, layouts=self.earlier.layouts, seconds=seconds)
        self.inside.record.info = info


def by_prompt(earlier: PruneInfo, left: list[int]) -> list[tuple[torch.Tensor, int]]:
    """For each prompt, with `left` tokens, its places that were kept before and how many it had; beams repeat them."""
    images, prompts = iter(zip(earlier.kept, earlier.tokens_before)), []
    beams = 1 if earlier.next_positions is None else len(left) // len(earlier.next_positions)
    for total in left[::beams]:
        places, tokens = [torch.arange(0)], 0
        while sum(map(len, places)) < total:
            chosen, number = next(images)
            places.append(chosen + tokens)
            tokens += number
        prompts += [(torch.cat(places), tokens)] * beams
    return prompts


@torch.no_grad()
def rotated(
    attention: torch.nn.Module, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], part: str
) -> torch.Tensor:
    """Queries ("q") or keys ("k") of an attention layer, (B, heads, n, D), as it rotates them."""
    heads = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{part}_norm"):
        heads = getattr(attention, f"{part}_norm")(heads)
    heads = heads.transpose(1, 2)
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb(heads, heads, *rotary)[0]
