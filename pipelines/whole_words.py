"""Words that a text tokenizer knows whole, read whole wherever they stand in a prompt.

Tokens of `studio.training.text_tokenizer` reach over spaces, so that "red apple" is one. Beside a word that training
never put there, such a token may end inside a word: "red fox" would be read as "red f" and "ox". A comma is no token
of these tokenizers, but tokens end there. So one is put beside such a word.
"""

import re
from typing import Any

_WORD = re.compile(r"\w+")
_COMMA = ", "


def with_whole_words(tokenizer: Any, text: str) -> str:
    """The text, with commas beside words that are a token alone and would be read in pieces.

    Tokenizers that read commas, as those of published models do, leave a text as it is.
    """
    if _ids(tokenizer, _COMMA):
        return text
    place = 0
    while (word := _broken(tokenizer, text, place)) is not None:
        start, end = word
        before, within, behind = text[:start].rstrip() + _COMMA, text[start:end], _COMMA + text[end:].lstrip()
        for left, right in ((before, text[end:]), (text[:start], behind), (before, behind)):
            if _broken(tokenizer, left + within + right, len(left), len(left) + len(within)) is None:
                text, end = left + within + right, len(left) + len(within)
                break
        place = end
    return text


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
