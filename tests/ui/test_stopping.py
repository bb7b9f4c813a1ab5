"""Work that is given up: when nobody listens, when the server stops, and in the middle of a long call."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from gradio.context import LocalContext

from studio import StudioError
from studio.errors import Stopped
from studio.ui.jobs.stopping import stoppable
from studio.ui.server import session as session
from studio.ui.server import worker
from studio.ui.server.models import Device
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.session import Listeners
from studio.ui.server.worker import CLOSED, CLOSING, DeviceWorker, drain, follow

LIMIT = 20  # seconds


@pytest.fixture
def device_worker(monkeypatch):
    """The only one, where a work lasts until it is told to end or to stop; `begun` are the works."""
    found = DeviceWorker(Device(), QueueLimits(max_waiting=8))
    found.begun, found.end = [], threading.Event()
    monkeypatch.setattr(worker, "_workers", [found])
    yield found
    found.end.set()


@pytest.fixture
def listeners(monkeypatch):
    monkeypatch.setattr(session, "_PATIENCE", 0.5)
    monkeypatch.setattr(worker, "_POLL", 0.1)
    listeners = Listeners()
    monkeypatch.setattr(session, "_listeners", listeners)
    return listeners


def ask(device_worker, name):
    """A task that follows a work."""

    def work(job):
        device_worker.begun.append(name)
        while not device_worker.end.wait(0.01) and not job.stopped:
            pass
        return "stopped" if job.stopped else "done"

    async def collect():
        LocalContext.request.set(SimpleNamespace(session_hash=name))
        return [item async for item in follow(work)][-1]

    return asyncio.create_task(collect())


def test_what_nobody_listens_for_is_dropped_and_frees_its_place(device_worker, listeners):
    async def scenario():
        listeners.arrive("heard")
        heard, never, left = ask(device_worker, "heard"), ask(device_worker, "never"), ask(device_worker, "left")
        listeners.arrive("left")
        await asyncio.sleep(0.1)
        listeners.leave("left")
        never, left = await asyncio.gather(never, left, return_exceptions=True)
        waiting = len(device_worker._queue)
        device_worker.end.set()
        return never, left, waiting, await heard

    never, left, waiting, heard = asyncio.run(asyncio.wait_for(scenario(), LIMIT))
    assert "Nobody listened" in str(never) and "Nobody listened" in str(left)
    assert waiting == 0 and heard == "done" and device_worker.begun == ["heard"]


def test_a_work_under_way_that_nobody_listens_for_stops(device_worker, listeners):
    async def scenario():
        [error] = await asyncio.gather(ask(device_worker, "never"), return_exceptions=True)
        return error

    assert "Nobody listened" in str(asyncio.run(asyncio.wait_for(scenario(), LIMIT)))
    ends = time.monotonic() + LIMIT
    while device_worker.load and time.monotonic() < ends:
        time.sleep(0.01)
    assert device_worker.begun == ["never"] and not device_worker.load


def test_a_server_that_stops_does_what_it_has_time_for(device_worker):
    async def scenario():
        tasks = [ask(device_worker, name) for name in "ab"]
        await asyncio.sleep(0.1)
        drained = asyncio.create_task(asyncio.to_thread(drain, LIMIT))
        await asyncio.sleep(0.1)
        late = ask(device_worker, "late")
        device_worker.end.set()
        return await asyncio.gather(*tasks, late, drained, return_exceptions=True)

    a, b, late, drained = asyncio.run(asyncio.wait_for(scenario(), LIMIT))
    assert (a, b, drained) == ("done", "done", True)
    assert isinstance(late, StudioError) and str(late) == CLOSING


def test_a_server_that_stops_refuses_the_rest_in_time(device_worker):
    async def scenario():
        tasks = [ask(device_worker, name) for name in "ab"]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        drained = await asyncio.to_thread(drain, 0.3)
        return await asyncio.gather(*tasks, return_exceptions=True), drained, time.monotonic() - began

    (a, b), drained, seconds = asyncio.run(asyncio.wait_for(scenario(), LIMIT))
    assert not drained and 0.3 <= seconds < 2
    assert [str(a), str(b)] == [CLOSED] * 2 and device_worker.begun == ["a"]


def test_a_network_stops_before_its_next_layer():
    class Slow(torch.nn.Module):
        def forward(self, pixels):
            job.stopped = True
            return pixels

    job = SimpleNamespace(stopped=False)
    network = torch.nn.Sequential(Slow(), torch.nn.Linear(1, 1))
    with stoppable(network, lambda: job.stopped), pytest.raises(Stopped):
        network(torch.zeros(1, 1))
    network(torch.zeros(1, 1))  # and no longer


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_everybody_is_told(number, tmp_path, tiny_folder):
    """Four jobs that would take long: the one under way and those that wait end with a sentence, in time."""
    code = (
        "import time, studio\n"
        "from studio import LlamaGen\n"
        "from studio.backends.cpu_c import NativeLlamaGen\n"
        "from studio.backends.packed import PackedLlamaGen\n"
        "for network in (LlamaGen, NativeLlamaGen, PackedLlamaGen):\n"
        "    for name in ('extend', 'extend_tree'):\n"
        "        def slow(self, *given, method=getattr(network, name), **how):\n"
        "            time.sleep(1)\n"
        "            return method(self, *given, **how)\n"
        "        setattr(network, name, slow)\n"
        "from studio.cli import main\n"
        "main()\n"
    )
    command = ["serve", "--port", "0", "--model", str(tiny_folder), "--drain-seconds", "1", "--max-batch", "4"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().split()[-1]
        [folder] = tmp_path.glob("studio-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        answers = []

        def follow_one(seed):
            if seed == 3:
                body = {"prompt": "a red apple", "seed": seed}
                found = httpx.post(f"{address}v1/images/generations", json=body, timeout=60)
                answers.append(f"{found.text} {found.status_code} {found.headers['retry-after']}")
                return
            data = {"data": ["a red apple", 1, seed, 1 + seed, None, None, None, "ar", {}, None, None]}
            with httpx.Client(base_url=address, timeout=60) as http:
                event = http.post("gradio_api/call/generate", json=data).json()["event_id"]
                with http.stream("GET", f"gradio_api/call/generate/{event}") as found:
                    answers.append(found.read().decode())

        threads = [threading.Thread(target=follow_one, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        began = time.monotonic()
        process.send_signal(number)
        for thread in threads:
            thread.join(LIMIT)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
    assert time.monotonic() - began < LIMIT
    assert len(answers) == 4 and all(CLOSED in answer for answer in answers), answers
    assert sum(answer.endswith(" 503 30") for answer in answers) == 1
    assert not list(tmp_path.glob("studio-*"))
