"""Whose turn it is, with requests that are nothing but a name."""

import random
from dataclasses import dataclass

import pytest

from studio import StudioError
from studio.ui.server.scheduler import FairQueue, QueueLimits


@dataclass(eq=False)
class Request:
    client: str
    name: str
    batch_key: str | None = None
    size: int = 1


def queue_of(*requests, **limits):
    queue = FairQueue(QueueLimits(**limits))
    for request in requests:
        queue.add(request)
    return queue


def turns(queue):
    taken = []
    while group := queue.take():
        taken.append(" ".join(request.name for request in group))
    return taken


def test_clients_take_turns_and_keep_their_own_order():
    requests = [Request("a", f"a{number}") for number in range(3)] + [Request("b", "b0"), Request("c", "c0")]
    assert turns(queue_of(*requests)) == ["a0", "b0", "c0", "a1", "a2"]


def test_a_newcomer_waits_for_one_turn_of_every_other_client():
    queue = queue_of(*(Request("a", f"a{number}") for number in range(9)), Request("b", "b0"))
    assert queue.take()[0].name == "a0"
    queue.add(Request("c", "c0"))
    assert turns(queue)[:4] == ["b0", "a1", "c0", "a2"]


def test_equal_requests_share_a_call_as_far_as_they_fit():
    requests = [Request(client, client, "same", 2) for client in "abcd"]
    assert turns(queue_of(*requests, max_batch=6)) == ["a b c", "d"]


def test_smaller_ones_fill_what_a_larger_one_leaves():
    requests = [Request("a", "a", "same", 3), Request("b", "b", "same", 2), Request("c", "c", "same", 1)]
    assert turns(queue_of(*requests, max_batch=4)) == ["a c", "b"]


def test_only_equal_ones_share_and_never_those_that_are_alone():
    requests = [Request("a", "a", "x"), Request("b", "b", "y"), Request("c", "c", "x"), Request("d", "d"),
                Request("e", "e")]  # fmt: skip
    assert turns(queue_of(*requests, max_batch=8)) == ["a c", "b", "d", "e"]


def test_nobody_overtakes_themselves_to_share_a_call():
    requests = [Request("a", "a0", "x"), Request("b", "b0", "y"), Request("b", "b1", "x")]
    assert turns(queue_of(*requests, max_batch=8)) == ["a0", "b0", "b1"]


def test_a_request_larger_than_a_call_is_done_alone():
    assert turns(queue_of(Request("a", "a", "x", 9), Request("b", "b", "x"), max_batch=4)) == ["a", "b"]


def test_what_has_no_room_is_refused_in_a_sentence():
    queue = queue_of(Request("a", "a0"), Request("a", "a1"), Request("b", "b0"), max_waiting=4, max_per_client=2)
    with pytest.raises(StudioError, match="You have 2 requests waiting already"):
        queue.add(Request("a", "a2"))
    queue.add(Request("c", "c0"))
    with pytest.raises(StudioError, match="All 4 places in the queue are taken"):
        queue.add(Request("d", "d0"))
    assert turns(queue) == ["a0", "b0", "c0", "a1"]


def test_a_removed_request_leaves_its_place():
    gone = Request("a", "a0")
    queue = queue_of(gone, Request("b", "b0"), max_waiting=2)
    queue.remove(gone)
    queue.remove(gone)
    queue.add(Request("c", "c0"))
    assert len(queue) == 2 and turns(queue) == ["b0", "c0"] and len(queue) == 0


def test_in_order_is_the_order_in_which_requests_are_taken():
    chance = random.Random(0)
    for _ in range(50):
        queue = queue_of(*(Request(chance.choice("abcd"), str(number)) for number in range(12)))
        expected = [request.name for request in queue.in_order()]
        assert turns(queue) == expected


def test_images_are_counted():
    assert queue_of(Request("a", "a", size=3), Request("a", "b", size=2)).images == 5
