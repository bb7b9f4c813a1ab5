"""`studio data scene`: an image with questions, decided by the seed."""

import json

import numpy as np
import pytest
from PIL import Image

from studio.data.scenes import draw_scene


def test_a_scene_is_the_one_of_its_seed(run, tmp_path):
    code, out, err = run("data", "scene", "new/scene.png", *"--seed 3 --tiles 1x2 --questions 4 --json".split())
    assert code == 0, err
    scene = draw_scene(np.random.default_rng(3), (1, 2), 4)
    assert (np.asarray(Image.open(tmp_path / "new/scene.png")) == scene.image).all()
    expected = [{"kind": q.kind, "question": q.text, "answer": q.answer} for q in scene.questions]
    assert json.loads(out) == {"path": "new/scene.png", "seed": 3, "tiles": [1, 2], "questions": expected}


@pytest.mark.parametrize(
    "options, word",
    [(["s.png", "--tiles", "5x1"], "--tiles"), (["s.png", "--tiles", "two"], "--tiles"), (["s.jpg"], ".png")],
)
def test_what_cannot_be_sampled_is_refused(run, tmp_path, options, word):
    code, out, err = run("data", "scene", *options)
    assert code == 2 and out == "" and word in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
