"""Completes prompts: samples the attributes that a prompt leaves unspecified, before its image is sampled.

Images of a training set may differ in a few named attributes, such as style and background. Given a prompt that leaves
an attribute unspecified, the distribution of images is a mixture over its values. Sampling the value first and then the
image samples from this mixture, and a small model does this much better than without the value.
"""

import re

import torch

from studio.errors import StudioError

_LONGEST, _MOST_OPTIONAL = 500, 10


def check_prompt_completion(choices: list[dict] | None) -> None:
    """Raises a `StudioError` for choices that `fill_unspecified` cannot use."""
    try:
        valid = all(
            _is_fast(choice["named"]) and choice["one_of"] and all(isinstance(way, str) for way in choice["one_of"])
            for choice in choices or ()
        )
    except (TypeError, KeyError, re.error, OverflowError, RecursionError):
        valid = False
    if not valid:
        raise StudioError(
            'prompt_completion is a list of {"named": a regular expression that repeats nothing but white space, '
            '"one_of": [phrases]}.'
        )


def _is_fast(pattern: str) -> bool:
    """Whether a regular expression is certain to be fast: words with white space between, few of them optional.

    Backtracking over repeated parts, or over many optional ones, may take exponential time.
    """
    plain = re.sub(r"\\s[+*]|\\.|\(\?", "", pattern)
    bounded = len(pattern) <= _LONGEST and not re.search(r"[*+{]", plain) and plain.count("?") <= _MOST_OPTIONAL
    return bounded and not re.search(r"\\[1-9]|\(\?P", pattern) and re.compile(pattern) is not None


def fill_unspecified(prompt: str, choices: list[dict], generator: torch.Generator) -> str:
    """The prompt, with a phrase for every attribute that it leaves unspecified.

    Args:
        prompt: the text.
        choices: the attributes in the order of a caption: `named`, a regular expression that finds the attribute in a
            prompt (case-insensitive), and `one_of`, its equally likely phrases.
        generator: samples the phrases; it is not used where nothing is unspecified.
    """
    prompt = re.sub(r"\s+", " ", prompt)  # what a pattern may repeat is then one space at most
    for index, choice in enumerate(choices):
        if _place(prompt, choice) is not None:
            continue
        phrases = choice["one_of"]
        phrase = phrases[int(torch.randint(len(phrases), (), generator=generator, device=generator.device))]
        later = [place for other in choices[index + 1 :] if (place := _place(prompt, other)) is not None]
        place = min(later, default=len(prompt))
        parts = (prompt[:place].rstrip(" ,"), phrase, prompt[place:].strip())
        prompt = ", ".join(part for part in parts if part)
    return prompt


def _place(prompt: str, choice: dict) -> int | None:
    found = re.search(choice["named"], prompt, re.IGNORECASE)
    return found.start() if found else None
