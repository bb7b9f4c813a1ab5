"""Captions of images, made from label, tags, style and background."""

import re
from functools import cache, lru_cache

import numpy as np

from studio.data.archive import STYLES, load_concepts
from studio.data.backgrounds import NAMES
from studio.data.splits import combination_is_held_out

_WORDS = re.compile(r"[a-z][a-z -]{2,}")
STYLE_WORDS = {"3d": "3d style", "flat": "flat style"}


def article(noun: str) -> str:
    """The noun with "a" or "an" ("an orange"); plurals and names of things that start with a digit stay bare."""
    first = noun.split()[0]
    if not first[0].isalpha() or (first.endswith("s") and not first.endswith(("ss", "us", "is"))):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@lru_cache(maxsize=1)
def names() -> tuple[tuple[str, ...], ...]:
    """The unique names of every concept: its label, then tags that no other concept has."""
    concepts = load_concepts()
    uses: dict[str, int] = {}
    for concept in concepts:
        for name in {concept.label, *concept.tags}:
            uses[name] = uses.get(name, 0) + 1
    return tuple(
        (
            concept.label,
            *(tag for tag in concept.tags if uses[tag] == 1 and tag != concept.label and _WORDS.fullmatch(tag)),
        )
        for concept in concepts
    )


def prompt_completion() -> list[dict]:
    """Style and background as `studio.pipelines.prompt_completion` takes them: where they are named, and how."""
    colour = rf"(?:{'|'.join(NAMES)})"
    on = r"on\s+(?:an?\s+)?"
    return [
        {"named": r"\b3d\b|\bflat\b(?! shoe)", "one_of": [STYLE_WORDS[style] for style in STYLES]},
        {
            "named": rf"\b(?:{on})?{colour}\s+background\b|\b{on}{colour}\b|\bbackground\b",
            "one_of": [f"on {article(name)} background" for name in NAMES],
        },
    ]


@cache
def one_is_held_out(label: str, background: str) -> bool:
    """Whether any style of a concept on a background is held out from generators."""
    return any(combination_is_held_out(label, style, background) for style in STYLES)


def full_caption(concept_index: int, style_index: int, background_index: int) -> str:
    """The full caption: "a red apple, flat style, on a blue background"."""
    label = load_concepts()[concept_index].label
    return f"{article(label)}, {STYLE_WORDS[STYLES[style_index]]}, on {article(NAMES[background_index])} background"


def random_caption(concept_index: int, style_index: int, background_index: int, rng: np.random.Generator) -> str:
    """A random caption.

    The label (now and then a unique tag, or the label with a tag beside it), with or without its article; the style is
    named three times in four and the background four times in five. What is not named is left open. Where a style of
    the concept on this background is held out, the style is always named: left open, it would come to mean the other
    one, the only one that training ever shows there.
    """
    concept = load_concepts()[concept_index]
    known = names()[concept_index]
    sample = rng.random(5)
    noun = known[rng.integers(1, len(known))] if len(known) > 1 and sample[0] < 0.2 else concept.label
    parts = [article(noun) if sample[1] < 0.6 else noun]
    if noun == concept.label and concept.tags and sample[0] > 0.92:
        parts.append(concept.tags[rng.integers(len(concept.tags))])
    if sample[2] < 0.75 or one_is_held_out(concept.label, NAMES[background_index]):
        parts.append(STYLE_WORDS[STYLES[style_index]])
    if sample[3] < 0.8:
        background = NAMES[background_index]
        phrases = (f"on {article(background)} background", f"{background} background", f"on {background}")
        parts.append(phrases[0 if sample[4] < 0.6 else 1 if sample[4] < 0.8 else 2])
    return ", ".join(parts)
