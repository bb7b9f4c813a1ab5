"""A picture and a question to an answer: a vision-language model of transformers, with any token pruner."""

import time
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from studio.errors import StudioError
from studio.pruning.binding import prune_inputs
from studio.pruning.shortening import PruneInfo

MAX_QUESTION_CHARACTERS = 2000


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost.

    Args:
        answer: the text.
        visual_tokens, kept_tokens: tokens of the picture before and after pruning, newlines included.
        seconds: "encode" (vision tower), "select" (choice of tokens), "prefill" (prompt to first token), "decode".
        cache_bytes: keys and values that the language model holds at the end.
        info: which tokens were kept, and where they lie.
    """

    answer: str
    visual_tokens: int
    kept_tokens: int
    seconds: dict[str, float]
    cache_bytes: int
    info: PruneInfo


class VisualQuestionPipeline:
    """Answers questions about pictures.

    Args:
        model: a vision-language model of transformers that `studio.prune` supports.
        processor: its processor.
    """

    def __init__(self, model, processor):
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
        max_new_tokens: int = 64,
        streamer=None,
        **options,
    ) -> Answer:
        """Answers greedily.

        Args:
            image: a PIL picture in RGB.
            question: what to ask, at most 2,000 characters.
            prune: a pruning method (`studio.prune`), or `None` to keep every token.
            keep: the fraction of the picture's tokens to keep, in (0, 1].
            max_new_tokens: longest answer.
            streamer: follows the answer, as in transformers (`TextIteratorStreamer`).
            options: more settings of `studio.prune_inputs`.

        Errors: `StudioError` for an empty or too long question, a setting out of range, an unknown method, and a
            model and a method that do not go together.
        """
        if not isinstance(question, str) or not question.strip():
            raise StudioError("The question is empty: ask something about the picture.")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise StudioError(f"The question has {len(question)} characters; at most {MAX_QUESTION_CHARACTERS} count.")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise StudioError(f"max_new_tokens must be a whole number above 0, not {max_new_tokens!r}.")
        inputs = self.processor(images=image, text=self._prompt(question.strip()), return_tensors="pt").to(self.device)
        if inputs["pixel_values"].is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        method, share = (prune, keep) if prune else ("uniform", 1.0)
        pruned, info = prune_inputs(self.model, inputs, method, share, **options)
        clock = _FirstToken(self.device)
        out = self.model.generate(
            **pruned,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            streamer=streamer,
        )
        ended = _now(self.device)
        answer = out.sequences[0, pruned["input_ids"].shape[1] :]
        return Answer(
            answer=self.processor.decode(answer, skip_special_tokens=True).strip(),
            visual_tokens=sum(info.tokens_before),
            kept_tokens=sum(info.tokens_after),
            seconds={**info.seconds, "prefill": clock.first - clock.began, "decode": ended - clock.first},
            cache_bytes=_cache_bytes(out.past_key_values),
            info=info,
        )

    def _prompt(self, question: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            return f"{self.processor.image_token}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token was there."""

    def __init__(self, device: torch.device):
        self.device, self.began, self.first = device, _now(device), None

    def __call__(self, input_ids, scores, **kwargs):
        if self.first is None:
            self.first = _now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache_bytes(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
