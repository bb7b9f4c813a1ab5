"""Visual question answering with a vision-language model of transformers and any token pruning method."""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import (
    BatchFeature,
    Cache,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from studio import backends
from studio.checks import check_integer, check_text, first_line
from studio.errors import StudioError
from studio.images import rgb_image
from studio.pipelines.chat_template import check_template, checked_tokenize, render_template
from studio.pruning.adapters import family_of
from studio.pruning.api import merge_tokens, prune_inputs
from studio.pruning.api import prune as pruning
from studio.pruning.budget import count
from studio.pruning.kv_cache import compress
from studio.pruning.merging import Counts, MergeRecord, TowerTokens, merging_from
from studio.pruning.patch_views import PatchView, patch_views
from studio.pruning.quecc import Compressor, compress_inputs
from studio.pruning.registry import INSIDE
from studio.pruning.shortening import PruneInfo, PruneRecord

MAX_QUESTION_CHARACTERS = 2000
MAX_NEW_TOKENS = 100_000
_CROPS_IN_PLACE = ("llava_next", "llava_onevision")
"""Families whose layouts contain the positions of crops."""

_MARKS = ("image_token", "video_token")
"""Attributes of a processor: the texts that stand for an image or a video."""

_KEEP = 0.2
"""The fraction of tokens that a method keeps by default."""


@dataclass(frozen=True)
class Answer:
    """An answer of the model, and its cost.

    Args:
        answer: the text, partial or complete.
        visual_tokens, kept_tokens: tokens of the image before and after pruning, newlines included.
        seconds: "encode" (vision tower), "select" (choice of tokens), "prefill" (prompt to first token) and "decode".
        cache_bytes: size of the language model's key/value cache at the end.
        info: the kept tokens.
        views: their positions in the image: of the whole image, and of crops where their positions are known.
        prompt_tokens, answer_tokens: tokens of the prompt, those kept of the image included, and of the answer.
        tower: the patches of the image and what merging left of them in the vision tower; `None` without merging.
    """

    answer: str
    visual_tokens: int
    kept_tokens: int
    seconds: dict[str, float]
    cache_bytes: int
    info: PruneInfo
    views: tuple[PatchView, ...]
    prompt_tokens: int = 0
    answer_tokens: int = 0
    tower: TowerTokens | None = None


@dataclass(frozen=True, eq=False)
class ImageMemory:
    """The compressed cache of an image, reused for several questions; from `VisualQuestionPipeline.remember`.

    Args:
        cache: keys and values of the prompt up to the end of the image.
        ids: that prompt, (1, L) int64.
        method, keep: of the compression.
        visual_tokens, kept_tokens: tokens of the image, and how many of them each layer keeps.
        seconds: "remember", the time to encode the image.
        cache_bytes: size of the cache.
        views: positions of the kept tokens in the image, with "coverage" and "coverage-merge" only.
        rope_deltas: of models with positions on three axes (Qwen, GLM): how far those of text are behind its places.
        tower: as of an `Answer`.
    """

    cache: Cache
    ids: torch.Tensor
    method: str
    keep: float
    visual_tokens: int
    kept_tokens: int
    seconds: dict[str, float]
    cache_bytes: int
    views: tuple[PatchView, ...] = ()
    rope_deltas: torch.Tensor | None = None
    tower: TowerTokens | None = None


OnStep = Callable[[Answer], bool | None]


class VisualQuestionPipeline:
    """Answers questions about images.

    Args:
        model: a vision-language model of transformers that `studio.prune` supports.
        processor: its processor.
        compressor: makes a few tokens of an image for a question (`studio train quecc`).
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, compressor: Compressor | None = None):
        check_template(getattr(processor, "chat_template", None))
        self.model: Any = model  # its calls differ from family to family
        self.processor: Any = processor
        self.compressor: Any = compressor  # mypy does not see through the wrapper of its `to`

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def to(self, device: torch.device | str) -> "VisualQuestionPipeline":
        """Moves the model and returns the pipeline."""
        self.model.to(device)
        if self.compressor is not None:
            self.compressor.to(device)
        return self

    def compressor_of(self) -> Compressor:
        """The compressor; raises a `StudioError` where there is none."""
        if self.compressor is None:
            raise StudioError(
                "This reader has no compressor: load the folder of a run of `studio train quecc --target emoji-vlm`."
            )
        return self.compressor

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image,
        question: str,
        *,
        prune: str | None = None,
        keep: float | None = None,
        after_layer: int | tuple[int, ...] | None = None,
        merge: Counts | str = 0,
        tokens: int | None = None,
        max_new_tokens: int = 64,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Answer:
        """Answers a question about an image with greedy decoding.

        Args:
            image: a PIL image of any mode, read as `studio.images.rgb_image` does.
            question: at most 2,000 characters.
            prune: a pruning method (`studio.prune`), or `None` to keep every token.
            keep: the fraction of the image's tokens that a method keeps, in (0, 1], by default 0.2; or a whole number
                of tokens: 1.0 is all of them and 1 is one.
            after_layer: prune inside the language model, after this layer (`studio.prune`); the kept tokens are then
                known after the first token of the answer.
            merge: tokens that the vision tower merges in its first layer, the second, ...; or "diffrate", what was
                learned for the model, or "diffrate:36+10,28+8", merged and pruned (`studio.merge_tokens`).
            tokens: read the image as that many tokens, made for the question (`studio.pruning.quecc`); without a
                method, on a reader with a compressor. It is scaled to a square.
            max_new_tokens: maximum length of the answer, 1 to 100,000.
            on_step: called with the partial answer when the tokens are chosen, and after each token of the answer;
                True stops.
            options: further settings of `studio.prune_inputs`.

        Raises:
            StudioError: a question that is empty, too long or contains an image token, a setting out of range, an
                unknown method, or a method that does not support the model.
        """
        max_new_tokens = self._checked(question, max_new_tokens)
        budget = _KEEP if keep is None else keep
        count(budget, 1)
        given = [name for name, value in {"keep": keep, "after_layer": after_layer}.items() if value is not None]
        if prune is None and (given := [*given, *options]):
            raise StudioError(f"{', '.join(given)} needs a method: add prune=, or leave it out.")
        image = rgb_image(image)
        if tokens is not None:
            if prune is not None:
                raise StudioError("tokens and prune exclude each other: leave one of them out.")
            image = self.compressor_of().square(self.model, image)
        inputs = self._inputs(image, question)
        with self.merging(merge) as merged:
            return self._answer(
                image, inputs, prune, budget, after_layer, tokens, max_new_tokens, on_step, merged, options
            )

    def merging(self, merge: Counts | str) -> AbstractContextManager[MergeRecord]:
        """A block in which the vision tower merges tokens.

        Args:
            merge: as of a call; 0 merges none.

        Raises:
            StudioError: as `studio.merge_tokens`, when the block begins.
        """
        return nullcontext(MergeRecord()) if merge == 0 else merge_tokens(self.model, **merging_from(merge))

    def _answer(
        self,
        image: Image.Image,
        inputs: BatchFeature,
        prune: str | None,
        budget: float,
        after_layer: int | tuple[int, ...] | None,
        tokens: int | None,
        max_new_tokens: int,
        on_step: OnStep | None,
        merged: MergeRecord,
        options: dict[str, Any],
    ) -> Answer:
        """A call, its arguments checked."""
        inside = after_layer is not None or prune in INSIDE
        pruned: Any
        if tokens is not None:
            pruned, info = self._compressed(inputs, tokens)
        elif prune == "vscan":
            pruned, info = inputs, PruneInfo(prune, budget)
        elif prune is None or inside:
            pruned, info = prune_inputs(self.model, inputs, "uniform", 1.0)
        else:
            pruned, info = prune_inputs(self.model, inputs, prune, budget, **options)
        block: AbstractContextManager[PruneRecord] = nullcontext(PruneRecord())
        if inside:
            block = pruning(self.model, prune or "", budget, after_layer=after_layer, **options)
        chosen = self._without_text(info, image.size, merged)
        if on_step is not None and on_step(chosen):
            return chosen
        steps = _Steps(self, chosen, pruned["input_ids"].shape[1], on_step)
        with block as record:
            out = self.model.generate(
                **pruned,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([steps]),
            )
        if inside:
            later = record.latest
            layouts = later.layouts or info.layouts
            chosen = self._without_text(replace(later, layouts=layouts), image.size, merged)
            encode = chosen.seconds["encode"] or info.seconds["encode"]
            steps.chosen = replace(chosen, seconds={**chosen.seconds, "encode": encode})
            steps.began += sum(later.seconds.values()) if prune == "vscan" else 0.0
        return replace(steps.answer(out.sequences), cache_bytes=_cache_bytes(out.past_key_values))

    def _compressed(self, inputs: BatchFeature, tokens: int) -> tuple[dict, PruneInfo]:
        """A prompt whose image is compressed for the question in it."""
        ids = inputs["input_ids"]
        return compress_inputs(
            self.model, self.compressor_of(), inputs, ids[ids != self.model.config.image_token_id][None], tokens
        )

    @torch.no_grad()
    def remember(
        self, image: Image.Image, *, method: str = "coverage-merge", keep: float = 0.05, merge: Counts | str = 0
    ) -> ImageMemory:
        """Encodes an image once, for any number of questions.

        The cache is compressed before any question is known, so methods that score by attention see the image only.

        Args:
            image: a PIL image in RGB.
            method: "coverage-merge" or another of `studio.compress`.
            keep: what each layer keeps of the image's tokens, a fraction or a number as of a call.
            merge: as of a call.

        Returns:
            The memory, for `ask`.

        Raises:
            StudioError: as `studio.compress`, and for processors that change the prompt after an image.
        """
        family = family_of(self.model, "uniform")
        began, probe = _now(self.device), "?"
        image = rgb_image(image)
        inputs = self._inputs(image, probe)
        ids = inputs["input_ids"][0].tolist()
        follows = ids[len(ids) - ids[::-1].index(self.model.config.image_token_id) :]
        end = len(ids) - len(self._tail(probe))
        if follows[len(follows) - len(ids) + end :] != self._tail(probe):
            raise StudioError(
                f"The processor of {self.model.config.model_type} changes the prompt after an image: ask each question "
                "on its own, with a method of pruning."
            )
        prompt = {
            name: value[:, :end] if value.shape[:2] == (1, len(ids)) and value.dim() == 2 else value
            for name, value in inputs.items()
        }
        with self.merging(merge) as merged:
            prompt, whole = prune_inputs(self.model, prompt, "uniform", 1.0)
        with compress(self.model, method, keep) as record:
            cache = self.model(**prompt, use_cache=True).past_key_values
        kept = replace(record.latest, layouts=whole.layouts)
        return ImageMemory(
            cache=cache,
            ids=prompt["input_ids"],
            method=method,
            keep=keep,
            visual_tokens=sum(kept.tokens_before),
            kept_tokens=sum(kept.tokens_after),
            seconds={"remember": _now(self.device) - began},
            cache_bytes=_cache_bytes(cache),
            views=self._without_text(kept, image.size, merged).views,
            rope_deltas=family.base.rope_deltas if family.mrope else None,
            tower=merged.latest,
        )

    @torch.no_grad()
    def ask(
        self, memory: ImageMemory, question: str, *, max_new_tokens: int = 64, on_step: OnStep | None = None
    ) -> Answer:
        """Answers a question about a remembered image with greedy decoding; the memory does not change.

        Args:
            memory: from `remember` of the same pipeline.
            question, max_new_tokens: as of a call.
            on_step: called with the partial answer after each of its tokens; True stops.

        Raises:
            StudioError: as a call.
        """
        max_new_tokens = self._checked(question, max_new_tokens)
        ids = torch.cat((memory.ids, torch.tensor([self._tail(question.strip())], device=self.device)), dim=1)
        info = PruneInfo(memory.method, memory.keep, [memory.visual_tokens], [memory.kept_tokens])
        counts = memory.visual_tokens, memory.kept_tokens
        empty = Answer("", *counts, dict(info.seconds), memory.cache_bytes, info, memory.views, tower=memory.tower)
        steps = _Steps(self, empty, ids.shape[1], on_step)
        if memory.rope_deltas is not None:
            family_of(self.model, "uniform").base.rope_deltas = memory.rope_deltas
        with compress(self.model, memory.method, memory.keep):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=copy.deepcopy(memory.cache),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([steps]),
            )
        return replace(steps.answer(out.sequences), cache_bytes=_cache_bytes(out.past_key_values))

    def _checked(self, question: str, max_new_tokens: int) -> int:
        """The checked length of an answer; raises a `StudioError` for an invalid question or length."""
        check_text("The question", question, MAX_QUESTION_CHARACTERS, "The question is empty: ask about the image.")
        for mark in filter(None, (getattr(self.processor, name, None) for name in _MARKS)):
            if mark in question:
                raise StudioError(f"The question contains {mark}, which stands for an image: leave it out.")
        return check_integer("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)

    def _inputs(self, image: Image.Image, question: str) -> BatchFeature:
        prompt = self._prompt(question.strip())
        try:
            inputs = checked_tokenize(lambda: self.processor(images=image, text=prompt, return_tensors="pt"))
        except ValueError as error:  # such as a prompt without a place for the image
            raise StudioError(f"The prompt that this model's chat template makes fails: {first_line(error)}") from error
        inputs = inputs.to(self.device)
        if inputs["pixel_values"].is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _tail(self, question: str) -> list[int]:
        """The token ids of a prompt behind its image."""
        ids = self.processor.tokenizer(self._prompt(question))["input_ids"]
        return ids[len(ids) - ids[::-1].index(self.model.config.image_token_id) :]

    def _without_text(self, info: PruneInfo, image_size: tuple[int, int], merged: MergeRecord) -> Answer:
        family = self.model.config.model_type
        centred = family == "llava" and getattr(self.processor.image_processor, "do_center_crop", False)
        crops = family in _CROPS_IN_PLACE
        return Answer(
            answer="",
            visual_tokens=sum(info.tokens_before),
            kept_tokens=sum(info.tokens_after),
            seconds={**info.seconds, "prefill": 0.0, "decode": 0.0},
            cache_bytes=0,
            info=info,
            views=patch_views(
                info.layouts[0], info.kept[0], image_size, centred=centred, crops=crops, merged=merged.places
            )
            if info.kept
            else (),
            tower=merged.latest,
        )

    def _prompt(self, question: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            return f"{self.processor.image_token}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return render_template(self.processor, [{"role": "user", "content": content}])


class _Steps(StoppingCriteria):
    """Times an answer, reports it to `on_step`, and stops when that returns True."""

    def __init__(self, pipe: VisualQuestionPipeline, chosen: Answer, prompt_length: int, on_step: OnStep | None):
        self.pipe, self.chosen, self.prompt_length, self.on_step = pipe, chosen, prompt_length, on_step
        self.began = _now(pipe.device)
        self.first: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if self.first is None:
            self.first = _now(self.pipe.device)
        stop = self.on_step is not None and bool(self.on_step(self.answer(input_ids)))
        return torch.full_like(input_ids[:, 0], stop, dtype=torch.bool)  # type: ignore[return-value]  # untyped dtype

    def answer(self, sequences: torch.Tensor) -> Answer:
        """The answer at the end of the first sequence, with the seconds so far."""
        now = _now(self.pipe.device)
        first = now if self.first is None else self.first
        seconds = {"prefill": first - self.began, "decode": now - first}
        text = self.pipe.processor.decode(sequences[0, self.prompt_length :], skip_special_tokens=True).strip()
        return replace(
            self.chosen,
            answer=text,
            seconds={**self.chosen.seconds, **seconds},
            prompt_tokens=self.prompt_length,
            answer_tokens=sequences.shape[1] - self.prompt_length,
        )


def _now(device: torch.device) -> float:
    backends.wait(device)
    return time.perf_counter()


def _cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
