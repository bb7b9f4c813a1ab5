"""Predictions of the judge: its likeliest classes, and the probability of the concept that a prompt names."""

import pytest
import torch
from PIL import Image

from studio.data.archive import load_concepts
from studio.errors import StudioError
from studio.evaluation.judge import Judge, judge_scores
from studio.evaluation.judge_predictions import judge_predictions, named_concept

LABELS = [concept.label for concept in load_concepts()]


def judge(concepts=1391):
    torch.manual_seed(0)
    return Judge(num_concepts=concepts, widths=(8, 8, 8), feature_dim=4, sample_size=16).eval()


def test_predictions_are_those_of_the_network():
    images = [Image.new("RGB", (16, 16), "teal"), Image.linear_gradient("L").resize((40, 40))]
    found = judge_predictions(judge(), images, "a red apple, flat style")
    pixels = torch.tensor([0, 128, 128]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 255
    scored = judge_scores(judge(), pixels)
    chances = scored.concepts[0].softmax(0)
    assert len(found) == 2 and found[0].concept == LABELS[int(chances.argmax())]
    assert found[0].style == ("3d", "flat")[int(scored.styles[0].argmax())]
    assert found[0].certainty == pytest.approx(float(chances.max()))
    assert found[0].agreement == pytest.approx(float(chances[LABELS.index("red apple")]))
    assert judge_predictions(judge(), images[:1], "a blorp")[0].agreement is None


def test_the_longest_concept_of_a_prompt_counts():
    assert LABELS[named_concept("A Red Apple, 3d style, on a blue background")] == "red apple"
    assert LABELS[named_concept("a fox, flat style")] == "fox"
    assert named_concept("foxes and pineapples") is None and named_concept(None) is None


def test_a_judge_of_other_concepts_is_refused():
    with pytest.raises(StudioError, match="knows 12 concepts"):
        judge_predictions(judge(12), [])
