"""Words that a text tokenizer knows whole, read whole wherever they stand in a prompt.

Tokens of `studio.training.text_tokenizer` reach over spaces, so that "red apple" is one. Beside a word that training
never put there, such a token may end inside a word: "red fox" would be read as "red f" and "ox". A comma is no token
of these tokenizers, but tokens end there. So one is put beside such a word.
"""

import re
from collections.abc import Iterator
from typing import Any

_WORD = re.compile(r"\w+")
_COMMA = ", "


def with_whole_words(tokenizer: Any, text: str) -> str:
    """The text, with commas beside words that are a token alone and would be read in pieces.

    Of the places for a comma that keep such a word whole, the one that leaves the fewest tokens is taken: it is in
    front of a phrase that is a token. Tokenizers that read commas, as those of published models do, leave a text as it
    is.
    """
    if _ids(tokenizer, _COMMA):
        return text
    place = 0
    while (word := _broken(tokenizer, text, place)) is not None:
        start, end = word
        whole = [
            (len(_ids(tokenizer, changed)), changed, begin)
            for changed, begin in _with_a_comma(text, start, end)
            if _broken(tokenizer, changed, begin, begin + end - start) is None
        ]
        if whole:
            _, text, start = min(whole, key=lambda found: found[0])
        place = start + word[1] - word[0]
    return text


def _with_a_comma(text: str, start: int, end: int) -> Iterator[tuple[str, int]]:
    """The text with a comma before a word, behind it, on both sides, or further before it; and where the word is."""
    earlier = [found.start() for found in _WORD.finditer(text, text.rfind(",", 0, start) + 1, start)]
    behind = _COMMA + text[end:].lstrip()
    for place in (start, *reversed(earlier[1:])):
        before = text[:place].rstrip() + _COMMA
        yield before + text[place:], len(before) + start - place
    yield text[:end] + behind, start
    before = text[:start].rstrip() + _COMMA
    yield before + text[start:end] + behind, len(before)


def _broken(tokenizer: Any, text: str, begin: int, end: int | None = None) -> tuple[int, int] | None:
    """Where the first word between two places stands that is a token alone and is none here; None: nowhere."""
    cuts = {place for span in _offsets(tokenizer, text) for place in span}
    for found in _WORD.finditer(text, begin, len(text) if end is None else end):
        inside = cuts & set(range(found.start() + 1, found.end()))
        if inside and len(_ids(tokenizer, found.group())) == 1:
            return found.span()
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])
