"""What counts as lost and as mixed up; and, slowly, servers in processes of their own."""

import json

import numpy as np
import pytest

from studio import StudioError
from studio.bench.load import Answer, Refusal, Request, compared, round_of, settings_of
from studio.bench.replicas import bench_replicas
from studio.bench.serve import bench_serve
from studio.bench.soak import Expected, bench_soak, judged_answer, judged_images

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
    assert found["requests"] == 3 and found["answered"] + found["lost"] + found["refused"] == 3
    return found["lost"], found["mixed_up"], found["different"]


def test_own_images_are_neither_lost_nor_mixed_up():
    assert counts(answer(0), answer(1), answer(2)) == (0, 0, 0)


def test_what_did_not_come_is_lost():
    assert counts(answer(0), None, answer(2)) == (1, 0, 0)
    assert counts(answer(0), answer(1, ALONE[1][0]), answer(2)) == (1, 0, 0)


def test_an_error_that_says_what_to_do_is_no_loss():
    found = compared(ASKED, [answer(0), Refusal(503, "Ask again."), None], ALONE)
    assert (found["answered"], found["refused"], found["lost"]) == (1, 1, 1)


def test_the_image_of_somebody_else_is_mixed_up():
    assert counts(answer(0, *ALONE[2]), answer(1), answer(2, *ALONE[0])) == (0, 2, 2)
    assert counts(answer(0), answer(1, *ALONE[1][::-1]), answer(2)) == (0, 1, 1)


def test_an_image_that_says_something_else_is_mixed_up():
    assert counts(answer(0, prompt="a rocket"), answer(1, temperature=2.0), answer(2)) == (0, 2, 0)


def test_an_image_a_little_off_is_different_but_not_mixed_up():
    assert counts(answer(0, ALONE[0][0] + 1), answer(1), answer(2)) == (0, 0, 0)
    assert counts(answer(0, ALONE[0][0] + 2), answer(1), answer(2)) == (0, 0, 1)


def test_requests_of_a_run_differ_in_all_that_may_differ():
    rounds = [round_of(number, 16, True) for number in range(3)]
    requests = [request for each in rounds for request in each]
    seeds = [request.seed + place for request in requests for place in range(request.count)]
    assert len({*seeds}) == len(seeds) and {request.count for request in requests} == {1, 2}
    assert len({json.dumps(request.settings) for request in rounds[0]}) == 7
    assert {(request.count, len(request.settings)) for request in round_of(0, 16, False)} == {(1, 0)}


def test_requests_have_settings_that_the_model_takes(tiny_mar_folder, tiny_folder):
    for folder, expected in ((tiny_mar_folder, set()), (tiny_folder, {"top_k", "top_p"})):
        requests = round_of(0, 16, True, settings_of(folder, "cpu"))
        assert {name for request in requests for name in request.settings} == {
            "guidance_scale",
            "temperature",
        } | expected


POOL = [Expected("generation", request, images) for request, images in zip(ASKED, ALONE)]
POOL += [Expected("question", ASKED[0], ALONE[0], "a fox"), Expected("question", ASKED[2], ALONE[2], "a rocket")]


@pytest.mark.parametrize(
    ("outcome", "verdicts"),
    [
        (answer(0), {"answered"}),
        (answer(0, ALONE[0][0] + 1), {"answered"}),
        (answer(0, ALONE[0][0] + 2), {"answered", "different"}),
        (answer(0, *ALONE[2]), {"answered", "different", "mixed_up"}),
        (answer(0, prompt="a rocket"), {"answered", "different", "mixed_up"}),
        (answer(1), {"lost"}),
        (Refusal(503, "Ask again."), {"refused"}),
        (None, {"lost"}),
    ],
)
def test_a_soak_counts_what_became_of_images(outcome, verdicts):
    assert set(judged_images(outcome, POOL[0], POOL)) == verdicts


@pytest.mark.parametrize(
    ("said", "verdicts"),
    [
        ("a fox", {"answered"}),
        ("a pear", {"answered", "different"}),
        ("a rocket", {"answered", "different", "mixed_up"}),
        (Refusal(503, "Ask again."), {"refused"}),
        (None, {"lost"}),
    ],
)
def test_a_soak_counts_what_became_of_questions(said, verdicts):
    assert set(judged_answer(said, POOL[3], POOL)) == verdicts


@pytest.mark.slow
def test_a_soak_loses_nothing(tiny_folder):
    found = bench_soak(tiny_folder, minutes=0.2, clients=6, max_batch=4, device="cpu")
    assert all(found["requests"].values()) and found["answered"] == sum(found["requests"].values())
    assert [found[name] for name in ("refused", "lost", "mixed_up", "different", "left_over")] == [0] * 5
    assert found["given_up"] and found["memory_mib"][0] > 0
    json.dumps(found)


@pytest.mark.ray
def test_a_killed_replica_costs_no_answer(tiny_folder):
    found = bench_replicas(tiny_folder, clients=8, requests=12, max_batch=4, device="cpu")
    assert found["answered"] + found["refused"] == found["requests"] == 96 and found["answered"] >= 90
    assert [found[name] for name in ("lost", "mixed_up", "different", "twice")] == [0] * 4
    assert found["retried"] and found["seconds_until_replaced"] and 24 <= found["killed_after"] < 96
    print(json.dumps(found))


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
