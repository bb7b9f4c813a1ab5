"""Processes that meet: what they collect, and how a mistake in one of them ends all."""

import json

from studio import processes
from tests.two_processes import outputs

PROGRAM = """
import json, sys
from studio.errors import StudioError
from studio.processes import agreed, gather, process_index

def prepare():
    if process_index() == 1:
        raise StudioError("The second one cannot.")

print(json.dumps(gather([process_index()] * (2 - process_index()))))
print(agreed(lambda: process_index() + 5))
try:
    agreed(prepare)
except StudioError as error:
    print(error)
    sys.exit(2)
"""


def test_two_processes_collect_and_agree(together, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    first, second = together("program.py")
    (said, errors), (also_said, _) = outputs([first, second])
    assert [json.loads(text.splitlines()[0]) for text in (said, also_said)] == [[0, 0, 1]] * 2, errors
    assert said.splitlines()[1:] == ["5", "The second one cannot."] and also_said.splitlines()[1:] == ["6"]
    assert (first.returncode, second.returncode) == (2, 0)


def test_one_process_has_nobody_to_wait_for():
    assert processes.process_count() == 1 and processes.join() is None
    assert processes.gather(["a"]) == ["a"] and processes.agreed(lambda: 3) == 3


def test_a_launcher_that_starts_one_process_of_several_is_named(monkeypatch):
    assert processes.launch_problem() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "--multi_gpu" in processes.launch_problem()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.launch_problem() is None
