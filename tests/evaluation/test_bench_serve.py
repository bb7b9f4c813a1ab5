"""What counts as lost and as mixed up; and, slowly, a server in a process of its own."""

import json

import numpy as np
import pytest

from studio import StudioError
from studio.bench.serve import Answer, Request, bench_serve, compared

ASKED = [Request("a fox", 1, None), Request("a fox", 2, None), Request("a fox", 3, 2.0)]
ALONE = [np.full((4, 4, 3), level, np.uint8) for level in (0, 100, 200)]


def answer(number, image=None, **call):
    request = ASKED[number]
    said = {"prompt": request.prompt} | ({} if request.guidance is None else {"guidance_scale": request.guidance})
    image = ALONE[number] if image is None else image
    return Answer(image, {"call": said | call, "seed": request.seed}, 1.0, 1)


def counts(*answers):
    found = compared(ASKED, answers, ALONE)
    assert found["requests"] == 3 and found["answered"] + found["lost"] == 3
    return found["lost"], found["mixed_up"], found["different"]


def test_own_images_are_neither_lost_nor_mixed_up():
    assert counts(answer(0), answer(1), answer(2)) == (0, 0, 0)


def test_what_did_not_come_is_lost():
    assert counts(answer(0), None, answer(2)) == (1, 0, 0)


def test_the_image_of_somebody_else_is_mixed_up():
    assert counts(answer(0, ALONE[1]), answer(1, ALONE[0]), answer(2)) == (0, 2, 2)


def test_a_image_that_says_something_else_is_mixed_up():
    assert counts(answer(0, prompt="a rocket"), answer(1, guidance_scale=2.0), answer(2)) == (0, 2, 0)


def test_a_image_a_little_off_is_different_but_not_mixed_up():
    assert counts(answer(0, ALONE[0] + 1), answer(1), answer(2)) == (0, 0, 0)
    assert counts(answer(0, ALONE[0] + 2), answer(1), answer(2)) == (0, 0, 1)


@pytest.mark.slow
def test_a_server_gives_everybody_their_own(tiny_folder):
    found = bench_serve(tiny_folder, clients=6, requests=2, max_batch=4, device="cpu")
    assert (found["requests"], found["lost"], found["mixed_up"], found["different"]) == (12, 0, 0, 0)
    assert found["images_a_call"] > 1 and found["memory_after_mib"] > 0
    json.dumps(found)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(StudioError, match="did not start: .*not a checkpoint"):
        bench_serve(tmp_path, clients=1, requests=1, device="cpu")
