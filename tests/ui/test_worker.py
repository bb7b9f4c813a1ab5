"""What becomes of works in the queue of a device, with works that are nothing but words."""

import asyncio
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from gradio.context import LocalContext

from studio import StudioError
from studio.ui.server import worker
from studio.ui.server.models import Device
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.worker import BatchSpec, DeviceWorker, follow

LIMIT = 10  # seconds


class House:
    """Stations of which the works can be held back; `calls` has the requests of every call."""

    def __init__(self, device_workers):
        self.device_workers, self.calls, self.jobs = device_workers, [], {}

    def ask(self, request, user, batch_key="same", size=1):
        """A task that collects what comes back for a request."""

        async def collect():
            LocalContext.request.set(SimpleNamespace(session_hash=user))
            batch = BatchSpec(batch_key, size, request, self.together, lambda ahead: ("ahead", ahead))
            return [item async for item in follow(lambda job: self.together([request], [job])[0], batch)]

        return asyncio.create_task(collect())

    def together(self, requests, jobs):
        self.calls.append([*requests])
        self.jobs |= dict(zip(requests, jobs))
        if "broken" in requests:
            raise RuntimeError("broken for all")
        while any(request.endswith("endless") and not job.stopped for request, job in zip(requests, jobs)):
            threading.Event().wait(0.01)
        return [
            StudioError("Wrong request.") if request == "wrong" else f"{request} on {jobs[0].device.name}"
            for request in requests
        ]

    @asynccontextmanager
    async def busy(self):
        """While the first device_worker does something else."""
        held, entered = threading.Event(), threading.Event()

        async def hold():
            return [item async for item in follow(lambda job: entered.set() or held.wait(LIMIT))]

        task = asyncio.create_task(hold())
        await asyncio.to_thread(entered.wait, LIMIT)
        yield
        await asyncio.sleep(0.05)
        held.set()
        await task


@pytest.fixture
def house(monkeypatch):
    def furnish(*names, **limits):
        device_workers = [
            DeviceWorker(Device(name), QueueLimits(**{"max_batch": 4, **limits})) for name in names or ("cpu",)
        ]
        monkeypatch.setattr(worker, "_workers", device_workers)
        return House(device_workers)

    return furnish


def outcome(tasks):
    return asyncio.gather(*tasks, return_exceptions=True)


def test_equal_works_are_done_in_one_call_and_each_gets_its_own(house):
    house = house()

    async def scenario():
        async with house.busy():
            tasks = [house.ask(f"{user}{number}", user) for user in "ab" for number in range(2)]
            tasks += [house.ask("other", "c", batch_key="other"), house.ask("big", "d", size=3)]
        return await outcome(tasks)

    found = asyncio.run(scenario())
    assert house.calls == [["a0", "b0", "a1", "b1"], ["other"], ["big"]]
    assert [items[-1] for items in found] == [
        f"{request} on cpu" for request in ("a0", "a1", "b0", "b1", "other", "big")
    ]


def test_a_wrong_one_fails_alone_and_so_does_one_that_breaks_its_call(house):
    house = house()

    async def scenario():
        async with house.busy():
            tasks = [house.ask(request, request) for request in ("right", "wrong")]
            tasks += [house.ask(request, request, batch_key="b") for request in ("broken", "with it")]
        return await outcome(tasks)

    right, wrong, broken, with_it = asyncio.run(scenario())
    assert right[-1] == "right on cpu" and str(wrong) == "Wrong request."
    assert str(broken) == "broken for all" and with_it[-1] == "with it on cpu"
    assert house.calls == [["right", "wrong"], ["broken", "with it"], ["broken"], ["with it"]]


def test_who_leaves_a_call_stops_nobody_else(house):
    house = house()

    async def scenario():
        async with house.busy():
            tasks = [house.ask("endless", "a"), house.ask("also endless", "b"), house.ask("calm", "c")]
        while len(house.jobs) < 3:
            await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0.05)
        stopped = {request: job.stopped for request, job in house.jobs.items()}
        tasks[1].cancel()
        return stopped, await outcome(tasks)

    stopped, found = asyncio.run(asyncio.wait_for(scenario(), LIMIT))
    assert stopped == {"endless": True, "also endless": False, "calm": False}
    assert [isinstance(each, asyncio.CancelledError) for each in found] == [True, True, False]
    assert found[2][-1] == "calm on cpu"


def test_who_leaves_the_queue_is_never_done_and_frees_the_place(house):
    house = house(max_waiting=2)

    async def scenario():
        async with house.busy():
            first, gone = house.ask("first", "a"), house.ask("gone", "b")
            await asyncio.sleep(0.05)
            gone.cancel()
            await asyncio.sleep(0.05)
            last = house.ask("last", "c")
        return await outcome([first, last])

    found = asyncio.run(scenario())
    assert [items[-1] for items in found] == ["first on cpu", "last on cpu"] and house.calls == [["first", "last"]]


def test_a_full_queue_refuses_and_one_user_cannot_fill_it(house):
    house = house(max_waiting=3, max_per_client=2)

    async def scenario():
        async with house.busy():
            tasks = [house.ask(f"{user}{number}", user) for user, number in ("a0", "a1", "a2", "b0", "c0")]
        return await outcome(tasks)

    a0, a1, a2, b0, c0 = asyncio.run(scenario())
    assert "You have 2 requests" in str(a2) and "All 3 places" in str(c0)
    assert isinstance(a2, StudioError) and isinstance(c0, StudioError)
    assert [items[-1] for items in (a0, a1, b0)] == ["a0 on cpu", "a1 on cpu", "b0 on cpu"]


def test_work_goes_where_least_waits(house):
    house = house("cpu", "meta")

    async def scenario():
        async with house.busy():
            await outcome([house.ask("first", "a")])
            return await outcome([house.ask("second", "a")])

    [second] = asyncio.run(scenario())
    assert second[-1] == "second on meta" and house.calls == [["first"], ["second"]]


def test_who_waits_is_told_how_many_come_before(house):
    house = house(max_batch=1)

    async def scenario():
        async with house.busy():
            tasks = [house.ask(user, user) for user in "abc"]
        return await outcome(tasks)

    a, b, c = asyncio.run(scenario())
    assert a[0] == ("ahead", 1) and b[0] == ("ahead", 2) and c[0] == ("ahead", 3)
    assert len(asyncio.run(outcome_of_one(house))) == 1


async def outcome_of_one(house):
    [found] = await outcome([house.ask("alone", "a")])
    return found


def test_nothing_is_lost_or_mixed_up_under_load(house):
    house = house("cpu", "meta", max_batch=5)

    async def scenario():
        tasks = [
            house.ask(f"{user}-{number}", user, batch_key=number % 3) for number in range(20) for user in "abcdefgh"
        ]
        return await outcome(tasks)

    found = asyncio.run(scenario())
    requests = [f"{user}-{number}" for number in range(20) for user in "abcdefgh"]
    assert [items[-1].split(" on ")[0] for items in found] == requests
    assert sorted(request for call in house.calls for request in call) == sorted(requests)
    assert 1 < max(map(len, house.calls)) <= 5


@pytest.mark.parametrize("pauses", range(4))
def test_who_is_cancelled_when_news_come_does_not_go_on(pauses):
    """`asyncio.wait_for` of Python 3.11 returns the news and swallows the cancellation."""

    async def scenario():
        job = worker.Job(asyncio.get_running_loop())

        async def follower():
            await job._next()
            await asyncio.sleep(60)

        task = asyncio.create_task(follower())
        await asyncio.sleep(0.01)
        job._news.set()
        for _ in range(pauses):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=2)
        return task.cancelled()

    assert asyncio.run(scenario())
