"""What a prompt leaves open, chosen before an image is sampled.

A model may have learned images that differ in a few named ways, such as style and background. The distribution of an
image given words that leave one of them open is a mixture over its values; to sample from a mixture is to sample the
value first, then the image given it. A small model does that second part much better than both at once.
"""

import re

import torch

from studio.errors import StudioError

_LONGEST, _MOST_OPTIONAL = 500, 10


def check_prompt_completion(choices) -> None:
    """Raises a `StudioError` for choices that are not as `fill_unspecified` takes them."""
    try:
        valid = all(
            _ends(choice["named"]) and choice["one_of"] and all(isinstance(way, str) for way in choice["one_of"])
            for choice in choices or ()
        )
    except (TypeError, KeyError, re.error, OverflowError, RecursionError):
        valid = False
    if not valid:
        raise StudioError(
            'prompt_completion is a list of {"named": a regular expression that repeats nothing but white space, '
            '"one_of": [phrases]}.'
        )


def _ends(pattern: str) -> bool:
    """Whether a regular expression surely takes little time: words, of which few are optional, with space between.

    Backtracking over anything that is repeated, or over many optional parts, may take for ever.
    """
    plain = re.sub(r"\\s[+*]|\\.|\(\?", "", pattern)
    bounded = len(pattern) <= _LONGEST and not re.search(r"[*+{]", plain) and plain.count("?") <= _MOST_OPTIONAL
    return bounded and not re.search(r"\\[1-9]|\(\?P", pattern) and re.compile(pattern) is not None


def fill_unspecified(prompt: str, choices: list[dict], generator: torch.Generator) -> str:
    """The prompt with a phrase for everything that it leaves open.

    Args:
        prompt: the words.
        choices: what there is to choose, in the order of a caption: `named`, a regular expression that finds the place
            where a prompt (in any case) names it, and `one_of`, phrases that are all as likely.
        generator: chooses; it is not used where nothing is open.
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


def _place(prompt, choice):
    found = re.search(choice["named"], prompt, re.IGNORECASE)
    return found and found.start()
