"""The bundled reader reads: unseen scenes, whole and from a fifth of their tokens, and the examples of the app."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from studio import load
from studio.data.scenes import TILE, draw_scene
from studio.evaluation.reading import exact_answers, pack_questions, packed_logits
from studio.evaluation.scenes import _STREAM, evaluate_reader
from studio.training.reader_network import PATCH
from studio.ui.tabs import ask

ANSWERS = ("2", "watermelon", "box")
_THUMBNAIL = (TILE // PATCH) ** 2


def test_it_reads_unseen_scenes_and_knows_little_without_looking():
    """96 questions of seed 1. Its card says 87 %: below 75 % with a probability of 0.001. Seven tokens of 744 show
    hardly anything, so that their share is what can be guessed."""
    pipe = load("emoji-vlm", device="cpu")
    found = evaluate_reader(pipe.model, pipe.processor, scenes=8, seed=1, methods=("divprune",), keeps=(0.2, 0.01))
    whole, pruned = found["accuracy"]["none"]["1.0"], found["accuracy"]["divprune"]
    assert found["visual_tokens"] >= 576
    assert whole > 0.75 and pruned["0.2"] > 0.6
    assert pruned["0.01"] < 0.5


@torch.inference_mode()
def test_it_needs_the_crops_and_hardly_the_thumbnail():
    """The first 96 questions of the evaluation. The crops alone should answer what all tokens do, 87 %."""
    pipe = load("emoji-vlm", device="cpu")
    hits = {"thumbnail": [], "crops": []}
    for number in range(8):
        scene = draw_scene(np.random.default_rng((_STREAM, 0, number)))
        packed = pack_questions(pipe.processor.tokenizer, [[(each.text, each.answer) for each in scene.questions]])
        pixels = pipe.processor.image_processor([Image.fromarray(scene.image)], return_tensors="pt")
        [features] = pipe.model.model.get_image_features(**pixels, return_dict=True).pooler_output
        places = torch.arange(len(features))
        for name, read in (("thumbnail", places[:_THUMBNAIL]), ("crops", places[_THUMBNAIL:])):
            logits = packed_logits(pipe.model, features[None, read], 1 + read, 1 + len(features), packed)
            hits[name] += exact_answers(logits, packed)[0].tolist()
    assert np.mean(hits["thumbnail"]) < 0.55 < 0.75 < np.mean(hits["crops"])


def test_its_scenes_have_the_tiles_that_are_asked_for(run):
    code, out, err = run("evaluate", "emoji-vlm", "--samples", 1, "--tiles", "1x1", "--json")
    assert code == 0 and json.loads(out)["visual_tokens"] == 300, err
    code, out, err = run("evaluate", "emoji-vlm", "--tiles", "5x1")
    assert code == 2 and out == "" and "from 1 to 4" in err


@pytest.mark.parametrize(("example", "answer"), list(zip(ask.EXAMPLES, ANSWERS, strict=True)))
def test_the_apps_examples_are_answered_from_a_fifth_of_the_tokens(run, example, answer):
    file, question = example
    image = Path(ask.__file__).parent / file
    code, out, err = run("ask", image, question, "--prune", "divprune", "--keep", 0.2, "--json")
    document = json.loads(out)
    assert code == 0 and document["answer"] == answer, err
    assert document["kept_tokens"] == round(0.2 * document["visual_tokens"])
