"""Many questions in one pass: each is answered as if it were asked alone, whole and pruned."""

import numpy as np
import pytest
import torch
from PIL import Image

from studio.data.scenes import draw_scene
from studio.evaluation.reading import IGNORED, exact_answers, pack_questions, packed_logits
from studio.evaluation.scenes import evaluate_reader, evaluate_singles
from studio.pruning.api import prune_inputs


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_every_question_is_answered_as_if_alone(tiny_reader, keep):
    model, processor = tiny_reader
    scene = draw_scene(np.random.default_rng(0), (1, 2), questions=5)
    texts = [(question.text, question.answer) for question in scene.questions]
    packed = pack_questions(processor.tokenizer, [texts])
    for number, (question, answer) in enumerate(texts):
        prompt = f"<image>\n{question} {answer}"
        inputs = processor(images=Image.fromarray(scene.image), text=prompt, return_tensors="pt")
        pruned, info = prune_inputs(model, inputs, "divprune", keep)
        expected = model(**pruned).logits[0]
        if number == 0:
            features = pruned["mm_encoder_outputs"]["image"].pooler_output[0]
            logits = packed_logits(model, features[None], 1 + info.kept[0], 1 + info.tokens_before[0], packed)[0]
        mine = logits[packed.question[0] == number]
        torch.testing.assert_close(mine, expected[1 + len(features) :], atol=2e-4, rtol=2e-4)


def test_exact_means_every_token_and_the_end(tiny_reader):
    tokenizer = tiny_reader[1].tokenizer
    packed = pack_questions(tokenizer, [[("Is there a fox?", "yes"), ("Which word is in row 1, column 1?", "ant")]])
    logits = torch.nn.functional.one_hot(packed.targets.clamp(min=0), len(tokenizer)).float()
    assert exact_answers(logits, packed)[0].tolist() == [True, True]
    last = (packed.targets[0] != IGNORED).nonzero()[-1]
    logits[0, last] = 0
    assert exact_answers(logits, packed)[0].tolist() == [True, False]


def test_a_random_reader_is_hardly_ever_right(tiny_reader):
    result = evaluate_reader(*tiny_reader, scenes=2, methods=("divprune",), keeps=(0.5,), tiles=(1, 1))
    assert set(result["accuracy"]) == {"none", "divprune"} and set(result["accuracy"]["divprune"]) == {"0.5"}
    assert result["accuracy"]["none"]["1.0"] < 0.3 and result["questions"] == 24


def test_a_random_reader_hardly_ever_knows_a_single_emoji(tiny_reader):
    model, processor = tiny_reader
    result = evaluate_singles(model, processor, images=3)
    assert set(result["by_question"]) == {"name", "style", "background"}
    assert (result["images"], result["questions"]) == (3, 9) and result["accuracy"] < 0.3
    again = evaluate_singles(model, processor, images=3)
    assert again == result
