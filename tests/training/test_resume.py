"""A run that was killed, whenever it was, comes to the result of an unbroken one."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from studio.training import loop
from studio.training.report import read_metrics
from studio.training.state import load_state
from tests.training.tiny_run import lines, same, train, weights

pytestmark = pytest.mark.usefixtures("saved_often")


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "average": 0.5, "sample_every": 2, "cooldown": 0.5}], ids=str
)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, options):
    """Stopped after every number of steps: weights, their average, codes, loss and `metrics.csv`."""
    whole = train(tmp_path / "whole", **options)
    per_step = options.get("accumulate", 1)
    for stop in range(2, 6):
        out = tmp_path / f"broken-{stop}"
        with pytest.raises(KeyboardInterrupt):
            train(out, stop_at=per_step * stop + 1, **options)
        assert not (out / "model").exists() and 0 < load_state(out)[0] < 6
        result = train(out, resume=True, **options)
        assert result["steps"] == 6 and same(weights(tmp_path / "whole"), weights(out))
        assert result["loss"] == whole["loss"] and result["validation_loss"] == whole["validation_loss"]
        assert lines(out) == lines(tmp_path / "whole")


def test_no_part_of_the_state_is_superfluous(tmp_path):
    """The control: with any part of the state of step 3 left out, or the average's age, the result is another."""
    train(tmp_path / "whole", average=0.9)
    load = loop.load_state
    parts = {"optimizers.safetensors": "exp_avg", "average.safetensors": "last", "model.safetensors": "codes._codebook"}
    for file, part in {**parts, "age": None}.items():
        out = tmp_path / file
        with pytest.raises(KeyboardInterrupt):
            train(out, stop_at=5, average=0.9)

        def spoiled(folder, file=file, part=part):
            step, tensors, values = load(folder)
            if part is None:
                return step, tensors, {**values, "average_step": 0}
            for key, value in tensors[file].items():
                if part in key and value.is_floating_point():
                    value.zero_()
            return step, tensors, values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "load_state", spoiled)
            train(out, resume=True, average=0.9)
        assert not same(weights(tmp_path / "whole"), weights(out)), file


def test_lines_after_the_state_are_written_anew(tmp_path, monkeypatch):
    """The state is older than the last lines, as after most kills; a finished run that goes on adds none."""
    whole = tmp_path / "whole"
    train(whole, sample_every=2)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(out, stop_at=4, sample_every=2)
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 1e9)
    with pytest.raises(KeyboardInterrupt):
        train(out, stop_at=4, resume=True, sample_every=2)
    assert int(read_metrics(out)[-1]["step"]) > load_state(out)[0]
    for _ in range(2):
        train(out, resume=True, sample_every=2)
        assert lines(out) == lines(whole)
    assert [step for step, *_ in lines(whole)] == ["1", "2", "2", "3", "4", "4", "5", "6", "6"]


PROGRAM = """
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import tiny_run

tiny_run.loop.SAVE_EVERY_SECONDS, tiny_run.loop.REPORT_EVERY = -1, 1
for line in sys.stdin:  # a child for every run, so that one start of Python does for all
    if not (child := os.fork()):
        os.setsid()
        print(os.getpid(), flush=True)
        resume = tiny_run.loop.has_state(Path("run"))
        tiny_run.train(Path("run"), pause=0.003, steps=40, sample_every=15, resume=resume)
        os._exit(0)
    print("killed" if os.waitpid(child, 0)[1] else "finished", flush=True)
"""


def test_killed_at_random_moments_it_comes_to_the_same_result(tmp_path):
    """SIGKILL after random times (seed 0) until a run survives: the result of an unbroken run, at least four kills."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the program: other numbers of threads round otherwise
    train(tmp_path / "whole", steps=40, sample_every=15)
    torch.set_num_threads(threads)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)], cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    rng, kills = random.Random(0), 0
    try:
        for _ in range(60):
            program.stdin.write("\n")
            program.stdin.flush()
            child = int(program.stdout.readline())
            if kills < 8:
                _wait_for_a_step(tmp_path / "run")
                time.sleep(rng.uniform(0, 0.15))
                with contextlib.suppress(ProcessLookupError):  # it has finished meanwhile
                    os.kill(child, signal.SIGKILL)
            outcome = program.stdout.readline().strip()
            kills += outcome == "killed"
            if outcome == "finished":
                break
    finally:
        program.kill()
        program.communicate()
    assert outcome == "finished" and kills >= 4
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def _wait_for_a_step(out):
    """Until something new is saved, a minute at most."""
    before, until = _states(out), time.monotonic() + 60
    while _states(out) == before and time.monotonic() < until and not (out / "model").is_dir():
        time.sleep(0.002)


def _states(out):
    return sorted(path.name for path in out.glob("state-*"))
