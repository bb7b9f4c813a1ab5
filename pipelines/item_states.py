"""Text states of the items of a prompt: replaced, and repaired where an item takes on what belongs to another.

"Follow the Flow: On Information Flow Across Textual Tokens in Text-to-Image Models" (arXiv:2504.01137). The states of a
text encoder are contextual, so that an item's states may hold attributes of another item. The repair encodes the item
alone and puts those states in its place, token by token; the other item keeps its states.

Deviation: the paper does not say what happens to positions. Tokens are aligned by their place inside the item, and an
item that has other tokens alone is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from studio.checks import shown
from studio.errors import StudioError
from studio.pipelines.base import ConditionalPipeline, listed


def replaced_states(
    states: torch.Tensor, spans: Sequence[tuple[int, int]], donor: torch.Tensor, first: int | None = None
) -> torch.Tensor:
    """Text states with those of some positions taken from another prompt.

    Args:
        states: (B, T, C) or (T, C).
        spans: (first, last + 1) of the positions that are replaced; they do not overlap.
        donor: states of the same shape, of the other prompt.
        first: where the only span begins in the donor; at the same position when None.

    Returns:
        A new tensor; other positions are equal, bit for bit.

    Raises:
        StudioError: another shape, and spans that are outside, empty or overlap.
    """
    if states.shape != donor.shape or states.ndim < 2:
        raise StudioError(
            f"States and donor have one shape (T, C); got {tuple(states.shape)} and {tuple(donor.shape)}."
        )
    if first is not None and len(spans) != 1:
        raise StudioError("A donor's place goes with one span: leave first out, or give one span.")
    length, replaced, end = states.shape[-2], states.clone(), 0
    for begin, stop in sorted(spans):
        source = begin if first is None else first
        if not end <= begin < stop <= length or not 0 <= source <= length - (stop - begin):
            raise StudioError(
                f"Spans are (first, last + 1) of 0 to {length}, without overlap, not {shown(list(spans))}."
            )
        replaced[..., begin:stop, :] = donor[..., source : source + stop - begin, :]
        end = stop
    return replaced


def token_span(pipe: ConditionalPipeline, prompt: str, item: str) -> tuple[int, int]:
    """Where the tokens of an item stand in a prompt: (first, last + 1).

    Raises:
        StudioError: the prompt does not have the item, or has it more than once.
    """
    whole, part = (_tokens(pipe, text) for text in (prompt, item))
    found = [start for start in range(len(whole) - len(part) + 1) if whole[start : start + len(part)] == part]
    if not part or len(found) != 1:
        times = "more than once" if found else "not"
        raise StudioError(
            f"{shown(prompt)} has the item {shown(item)} {times}: name words as they stand in the prompt."
        )
    if (last := found[0] + len(part)) > pipe.transformer.config.caption_length:
        raise StudioError(f"The item {shown(item)} is behind the tokens that the model reads: shorten the prompt.")
    return found[0], last


@contextmanager
def isolated_items(pipe: ConditionalPipeline, *items: str) -> Iterator[ConditionalPipeline]:
    """Within it, prompts of a pipeline are encoded with the states of these items taken from prompts of the item alone.

    A prompt without an item keeps its states. The encoding belongs to the pipeline, so all its calls are repaired
    meanwhile, those of other threads too.

    Args:
        pipe: a text-conditional pipeline.
        items: words as they stand in prompts, such as "a red apple".

    Raises:
        StudioError: a class-conditional pipeline, no item, and as of `token_span`.
    """
    if not pipe.takes_text or not items:
        raise StudioError("Items are words of prompts: name some, and use a text-conditional pipeline.")
    plain = pipe.encode_prompt

    def encode_prompt(prompt, device=None):
        texts = listed(prompt)
        states, mask = plain(texts, device)
        for row, text in enumerate(texts):
            for item in items:
                if item.lower() not in text.lower():
                    continue
                alone, _ = plain(item, device)
                span = token_span(pipe, text, item)
                states[row] = replaced_states(states[row], [span], alone[0], token_span(pipe, item, item)[0])
        return states, mask

    pipe.encode_prompt = encode_prompt  # type: ignore[method-assign]  # of this pipeline alone
    try:
        yield pipe
    finally:
        del pipe.encode_prompt


def _tokens(pipe, text):
    return pipe.tokenizer(pipe._normalized(text), add_special_tokens=False)["input_ids"]
