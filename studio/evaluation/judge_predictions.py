"""The judge's predictions for single images, as labels with probabilities."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from studio.data.archive import STYLES, load_concepts
from studio.data.backgrounds import NAMES
from studio.errors import StudioError
from studio.evaluation.judge import Judge, judge_scores

WHAT_IT_IS = (
    "The judge is a small network that names concept, style and background of an emoji. It only measures: nothing "
    "was trained against it, and of anything but emoji it knows nothing."
)


@dataclass(frozen=True)
class JudgePrediction:
    """The judge's prediction for one image.

    Args:
        concept, style, background: what it finds likeliest: "red apple", "flat", "blue".
        certainty: how likely it finds that concept, 0 to 1.
        agreement: how likely it finds the concept that the words name; `None` where they name none.
    """

    concept: str
    style: str
    background: str
    certainty: float
    agreement: float | None = None


def judge_predictions(judge: Judge, images: Sequence[Image.Image], prompt: str | None = None) -> list[JudgePrediction]:
    """Predictions of the judge for images.

    Args:
        judge: what `load_judge` returns, of the bundled set.
        images: PIL images of one size, or of several.
        prompt: the words that they were sampled from.

    Raises:
        StudioError: the judge knows other concepts than the bundled set has.
    """
    concepts = load_concepts()
    known = judge.config["num_concepts"]
    if known != len(concepts):
        raise StudioError(f"This judge knows {known} concepts, the bundled set has {len(concepts)}.")
    wanted = named_concept(prompt)
    return [_opinion(judge, image, concepts, wanted) for image in images]


def named_concept(prompt: str | None) -> int | None:
    """The number of the concept whose whole label a prompt contains, the longest one; `None` where there is none."""
    text = _plain(prompt or "")
    found = [each for each in load_concepts() if f" {_plain(each.label).strip()} " in text]
    return max(found, key=lambda each: len(each.label)).index if found else None


def _opinion(judge, image, concepts, wanted):
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(-1, 0)[None].float() / 255
    scored = judge_scores(judge, pixels)
    chances = scored.concepts[0].softmax(dim=0)
    likeliest = int(chances.argmax())
    return JudgePrediction(
        concepts[likeliest].label,
        STYLES[int(scored.styles[0].argmax())],
        NAMES[int(scored.backgrounds[0].argmax())],
        float(chances[likeliest]),
        None if wanted is None else float(chances[wanted]),
    )


def _plain(text):
    """The words of a text in lower case, with a space around each."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "
