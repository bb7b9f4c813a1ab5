"""What counts as lost and as mixed up; and, slowly, servers in processes of their own."""

import json

import numpy as np
import pytest

from studio import StudioError
from studio.bench.serve import Answer, Request, _round, bench_serve, compared

ASKED = [Request("a fox", 1), Request("a fox", 3, 2), Request("a fox", 5, 1, {"guidance_scale": 2.0})]
ALONE = [[np.full((4, 4, 3), 60 * (number + place), np.uint8) for place in range(count)]
         for number, count in ((0, 1), (1, 2), (3, 1))]  # fmt: skip


def answer(number, *images, **call):
    request = ASKED[number]
    said = {"prompt": request.prompt, "num_images": request.count, **request.settings, **call}
    records = [{"call": said, "seed": request.seed + place} for place in range(request.count)]
    return Answer(list(images) or ALONE[number], records, 1.0)


def counts(*answers):
    found = compared(ASKED, answers, ALONE)
    assert found["requests"] == 3 and found["answered"] + found["lost"] == 3
    return found["lost"], found["mixed_up"], found["different"]


def test_own_images_are_neither_lost_nor_mixed_up():
    assert counts(answer(0), answer(1), answer(2)) == (0, 0, 0)


def test_what_did_not_come_is_lost():
    assert counts(answer(0), None, answer(2)) == (1, 0, 0)
    assert counts(answer(0), answer(1, ALONE[1][0]), answer(2)) == (1, 0, 0)


def test_the_image_of_somebody_else_is_mixed_up():
    assert counts(answer(0, *ALONE[2]), answer(1), answer(2, *ALONE[0])) == (0, 2, 2)
    assert counts(answer(0), answer(1, *ALONE[1][::-1]), answer(2)) == (0, 1, 1)


def test_an_image_that_says_something_else_is_mixed_up():
    assert counts(answer(0, prompt="a rocket"), answer(1, temperature=2.0), answer(2)) == (0, 2, 0)


def test_an_image_a_little_off_is_different_but_not_mixed_up():
    assert counts(answer(0, ALONE[0][0] + 1), answer(1), answer(2)) == (0, 0, 0)
    assert counts(answer(0, ALONE[0][0] + 2), answer(1), answer(2)) == (0, 0, 1)


def test_requests_of_a_run_differ_in_all_that_may_differ():
    rounds = [_round(number, 16, True) for number in range(3)]
    requests = [request for each in rounds for request in each]
    seeds = [request.seed + place for request in requests for place in range(request.count)]
    assert len({*seeds}) == len(seeds) and {request.count for request in requests} == {1, 2}
    assert len({json.dumps(request.settings) for request in rounds[0]}) == 7
    assert {(request.count, len(request.settings)) for request in _round(0, 16, False)} == {(1, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_a_server_gives_everybody_their_own(tiny_folder, mixed):
    found = bench_serve(tiny_folder, clients=6, requests=3, max_batch=4, device="cpu", mixed=mixed)
    assert (found["requests"], found["lost"], found["mixed_up"], found["different"]) == (18, 0, 0, 0)
    assert found["batch_mean"] > 1 and found["memory_after_mib"] > 0 and found["time_to_first_partial"] > 0
    assert 0 < found["p50_seconds"] <= found["p95_seconds"] and found["reference_images_per_second"] > 0
    json.dumps(found)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(StudioError, match="did not start: .*not a checkpoint"):
        bench_serve(tmp_path, clients=1, requests=1, device="cpu")
