"""Work on lent GPUs, with a stand-in for the package `spaces` that runs tasks in a process of their own."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from studio import StudioError
from studio.ui.server import zerogpu
from studio.ui.server.worker import follow

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def durations(monkeypatch):
    """GPUs are lent: tasks are forked, what they yield comes back pickled; the list gets the duration of each task."""
    asked = []

    def gpu(duration):
        asked.append(duration)
        return _forked

    package = types.ModuleType("spaces")
    package.GPU = gpu
    monkeypatch.setitem(sys.modules, "spaces", package)
    monkeypatch.setattr(zerogpu, "is_lent", lambda: True)
    return asked


def _forked(task):
    def items(request):
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=_run, args=(task, request, there), daemon=True)
        process.start()
        try:
            while (item := here.recv()) is not None:
                yield item
        finally:
            here.close()
            process.join()

    return items


def _run(task, request, pipe):
    steps = task(request)
    try:
        for item in steps:
            pipe.send(item)
        pipe.send(None)
    except BrokenPipeError:
        steps.close()


def count(request, job):
    for number in range(request):
        job.report(number)
        if job.stopped:
            return "stopped"
    if request == 0:
        raise StudioError("Asked for something.")
    return f"counted to {request}"


async def collect(work, request):
    return [item async for item in follow(lambda job: work(request, job))]


def test_what_a_lent_gpu_reports_and_returns_comes_back(durations):
    items = asyncio.run(collect(zerogpu.on_gpu(seconds=30)(count), 5))
    assert durations == [30] and items[-1] == "counted to 5"
    assert items[:-1] == sorted(items[:-1]) and set(items[:-1]) <= set(range(5))


def test_a_mistake_keeps_its_sentence(durations):
    with pytest.raises(StudioError, match="Asked for something"):
        asyncio.run(collect(zerogpu.on_gpu(seconds=30)(count), 0))


def test_work_that_nobody_waits_for_stops():
    seen = []

    def endless(request, job):
        while not job.stopped:
            job.report(len(seen))
        seen.append("stopped")

    steps = zerogpu._items(endless, None)
    next(steps)
    steps.close()
    assert seen == ["stopped"]


def test_without_the_package_work_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(zerogpu, "find_spec", lambda name: None)
    assert not zerogpu.is_lent() and zerogpu.on_gpu(seconds=30)(count) is count


def test_models_are_placed_where_gpus_are_lent_only(monkeypatch, durations):
    placed = []
    monkeypatch.setattr(zerogpu, "get_pipeline", placed.append)
    zerogpu.preload("emoji-ar")
    monkeypatch.setattr(zerogpu, "is_lent", lambda: False)
    zerogpu.preload("emoji-ar")
    assert placed == ["emoji-ar"]


def test_the_entry_of_a_space_imports_spaces_before_torch(tmp_path):
    """Otherwise no GPU is lent; the stand-in stops the entry as soon as it is imported."""
    (tmp_path / "spaces.py").write_text("import sys\nsys.exit('torch' in sys.modules)\n")
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(ROOT / 'app.py')!r})\nraise SystemExit(3)"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == 0
