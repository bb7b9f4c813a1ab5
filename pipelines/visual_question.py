"""An image and a question to an answer: a vision-language model of transformers, with any token pruner."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from studio.checks import check_integer, check_number, check_text
from studio.errors import StudioError
from studio.images import rgb_image
from studio.pipelines.chat_template import bounded_render, check_template, checked_tokenize
from studio.pruning.adapters import family_of
from studio.pruning.api import prune as pruning
from studio.pruning.api import prune_inputs
from studio.pruning.kv_cache import compress
from studio.pruning.layout import PatchView, patch_views
from studio.pruning.registry import INSIDE
from studio.pruning.shortening import PruneInfo

MAX_QUESTION_CHARACTERS = 2000
MAX_NEW_TOKENS = 100_000
_CROPS_IN_PLACE = ("llava_next", "llava_onevision")
"""Families whose layouts tell where crops lie."""

_MARKS = ("image_token", "video_token")
"""What a processor calls the text that it takes for an image or a video."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost.

    Args:
        answer: the text, so far or whole.
        visual_tokens, kept_tokens: tokens of the image before and after pruning, newlines included.
        seconds: "encode" (vision tower), "select" (choice of tokens), "prefill" (prompt to first token), "decode".
        cache_bytes: keys and values that the language model holds at the end.
        info: which tokens were kept.
        views: where those lie in the image: the whole, and crops where their places are known.
    """

    answer: str
    visual_tokens: int
    kept_tokens: int
    seconds: dict[str, float]
    cache_bytes: int
    info: PruneInfo
    views: tuple[PatchView, ...]


@dataclass(frozen=True, eq=False)
class ImageMemory:
    """What a reader keeps of an image between questions; made by `VisualQuestionPipeline.remember`.

    Args:
        cache: keys and values of the prompt up to the end of the image.
        ids: (1, L) that prompt.
        method, keep: how the cache was made smaller.
        visual_tokens, kept_tokens: tokens of the image, and how many of them each layer holds.
        seconds: "remember", to read the image.
        cache_bytes: what the cache takes.
    """

    cache: object
    ids: torch.Tensor
    method: str
    keep: float
    visual_tokens: int
    kept_tokens: int
    seconds: dict[str, float]
    cache_bytes: int


class VisualQuestionPipeline:
    """Answers questions about images.

    Args:
        model: a vision-language model of transformers that `studio.prune` supports.
        processor: its processor.
    """

    def __init__(self, model, processor):
        check_template(getattr(processor, "chat_template", None))
        self.model, self.processor = model, processor

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device) -> "VisualQuestionPipeline":
        """Moves the model; returns the pipeline."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        image,
        question: str,
        *,
        prune: str | None = None,
        keep: float = 0.2,
        after_layer: int | tuple[int, ...] | None = None,
        max_new_tokens: int = 64,
        on_step: Callable[[Answer], bool | None] | None = None,
        **options,
    ) -> Answer:
        """Answers greedily.

        Args:
            image: a PIL image of any mode, read as `studio.images.rgb_image` does.
            question: what to ask, at most 2,000 characters.
            prune: a pruning method (`studio.prune`), or `None` to keep every token.
            keep: the fraction of the image's tokens to keep, in (0, 1].
            after_layer: prune behind this layer of the language model and not before it (see `studio.prune`); then the
                tokens that were kept are known in the answer, and not before its first token.
            max_new_tokens: longest answer, at most 100,000.
            on_step: called with the answer so far when the tokens are chosen, and after each token of the answer; True
                stops there.
            options: more settings of `studio.prune_inputs`.

        Errors: `StudioError` for a question that is empty, too long or holds the mark of an image, a setting out of
            range, an unknown method, and a model and a method that do not go together.
        """
        max_new_tokens = self._checked(question, max_new_tokens)
        share = float(check_number("keep", keep, 0, 1, above=True))
        image = rgb_image(image)
        inputs = self._inputs(image, question)
        if prune is None and (after_layer is not None or options):
            given = [*options, *(["after_layer"] if after_layer is not None else [])]
            raise StudioError(f"{', '.join(given)} needs a method: add prune=, or leave it out.")
        inside = after_layer is not None or prune in INSIDE
        if prune is None or inside:
            pruned, info = prune_inputs(self.model, inputs, "uniform", 1.0)
        else:
            pruned, info = prune_inputs(self.model, inputs, prune, share, **options)
        block = pruning(self.model, prune, share, after_layer=after_layer, **options) if inside else nullcontext()
        chosen = self._without_text(info, image.size)
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
            chosen = self._without_text(replace(record.info, layouts=info.layouts), image.size)
            steps.chosen = replace(chosen, seconds={**chosen.seconds, "encode": info.seconds["encode"]})
        return replace(steps.answer(out.sequences), cache_bytes=_cache_bytes(out.past_key_values))

    @torch.no_grad()
    def remember(self, image, *, method: str = "coverage", keep: float = 0.05) -> ImageMemory:
        """Reads an image once, for any number of questions.

        The cache is made smaller before any question is known, so methods that score by attention see the image alone.

        Args:
            image: a PIL image in RGB.
            method: "coverage" or another of `studio.compress`.
            keep: the fraction of the image's tokens that each layer keeps, in (0, 1].

        Errors: `StudioError` as `studio.compress`, and for models that count positions on three axes.
        """
        if family_of(self.model, "uniform").mrope:
            raise StudioError(f"{self.model.config.model_type} models keep positions outside of the cache: ask anew.")
        began, probe = _now(self.device), "?"
        inputs = self._inputs(rgb_image(image), probe)
        ids = inputs["input_ids"][0].tolist()
        follows = ids[len(ids) - ids[::-1].index(self.model.config.image_token_id) :]
        end = len(ids) - len(self._tail(probe))
        if follows[len(follows) - len(ids) + end :] != self._tail(probe):
            raise StudioError(
                f"The processor of {self.model.config.model_type} changes what follows an image: ask anew."
            )
        prompt = {
            name: value[:, :end] if value.shape[:2] == (1, len(ids)) and value.dim() == 2 else value
            for name, value in inputs.items()
        }
        with compress(self.model, method, keep) as record:
            cache = self.model(**prompt, use_cache=True).past_key_values
        return ImageMemory(
            cache=cache,
            ids=prompt["input_ids"],
            method=method,
            keep=keep,
            visual_tokens=sum(record.info.tokens_before),
            kept_tokens=sum(record.info.tokens_after),
            seconds={"remember": _now(self.device) - began},
            cache_bytes=_cache_bytes(cache),
        )

    @torch.no_grad()
    def ask(self, memory: ImageMemory, question: str, *, max_new_tokens: int = 64) -> Answer:
        """Answers greedily about an image that was read before; the memory stays as it is.

        Args:
            memory: from `remember` of the same pipeline.
            question, max_new_tokens: as in a call.
        """
        max_new_tokens = self._checked(question, max_new_tokens)
        ids = torch.cat((memory.ids, torch.tensor([self._tail(question.strip())], device=self.device)), dim=1)
        info = PruneInfo(memory.method, memory.keep, [memory.visual_tokens], [memory.kept_tokens])
        unsaid = Answer("", memory.visual_tokens, memory.kept_tokens, dict(info.seconds), 0, info, ())
        steps = _Steps(self, unsaid, ids.shape[1], None)
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

    def _checked(self, question, max_new_tokens) -> int:
        """The length of an answer; raises `StudioError` for a question that cannot be asked."""
        check_text("The question", question, MAX_QUESTION_CHARACTERS, "The question is empty: ask about the image.")
        for mark in filter(None, (getattr(self.processor, name, None) for name in _MARKS)):
            if mark in question:
                raise StudioError(f"The question holds {mark}, which stands for an image: leave it out.")
        return check_integer("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS)

    def _inputs(self, image, question: str):
        prompt = self._prompt(question.strip())
        inputs = checked_tokenize(lambda: self.processor(images=image, text=prompt, return_tensors="pt")).to(
            self.device
        )
        if inputs["pixel_values"].is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _tail(self, question: str) -> list[int]:
        """The ids of a prompt behind the mark of its image."""
        ids = self.processor.tokenizer(self._prompt(question))["input_ids"]
        return ids[len(ids) - ids[::-1].index(self.model.config.image_token_id) :]

    def _without_text(self, info: PruneInfo, image_size: tuple[int, int]) -> Answer:
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
            views=patch_views(info.layouts[0], info.kept[0], image_size, centred=centred, crops=crops),
        )

    def _prompt(self, question: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            return f"{self.processor.image_token}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return bounded_render(
            lambda: self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        )


class _Steps(StoppingCriteria):
    """Keeps the time of an answer, tells `on_step` of it, and stops when that says so."""

    def __init__(self, pipe: VisualQuestionPipeline, chosen: Answer, prompt_length: int, on_step):
        self.pipe, self.chosen, self.prompt_length, self.on_step = pipe, chosen, prompt_length, on_step
        self.began, self.first = _now(pipe.device), None

    def __call__(self, input_ids, scores, **kwargs):
        if self.first is None:
            self.first = _now(self.pipe.device)
        stop = self.on_step is not None and bool(self.on_step(self.answer(input_ids)))
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    def answer(self, sequences: torch.Tensor) -> Answer:
        """The answer at the end of the first sequence, with the seconds until now."""
        seconds = {"prefill": self.first - self.began, "decode": _now(self.pipe.device) - self.first}
        text = self.pipe.processor.decode(sequences[0, self.prompt_length :], skip_special_tokens=True).strip()
        return replace(self.chosen, answer=text, seconds={**self.chosen.seconds, **seconds})


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache_bytes(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
