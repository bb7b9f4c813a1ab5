"""`studio generate --prompts` in two real processes: the same images as in one, after a kill too."""

import json
import os
import subprocess
import sys
import time

import pytest
from PIL import Image

from studio import cli

FEW = [{"prompt": "a red apple", "num_images": 2}, {"prompt": "a green pear", "seed": 7}, {"prompt": "blue sky"}]
MANY = [{"prompt": "a red apple on a blue sky"} for _ in range(80)]


def write_prompts(folder, lines):
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))


def command(model, out):
    return ["generate", "--prompts", "prompts.jsonl", "--model", str(model), "--out", out, "--json"]


def alone(model, out):
    """Sample in the process of the test."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(command(model, out))
    assert stopped.value.code == 0


def images(folder):
    return {path.name: Image.open(path).tobytes() for path in folder.glob("*.png")}


def recorded(folder):
    """How many images each process has recorded."""
    return [file.read_text().count("\n") for file in sorted(folder.glob("records/*.jsonl"))]


def test_two_launched_processes_draw_what_one_samples(tiny_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path, FEW)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "studio"]
    environment = {**os.environ, "PYTHONPATH": str(cli.__file__).removesuffix("/studio/cli.py")}
    done = subprocess.run(
        [*launcher, *command(tiny_folder, "two")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"] == 2 and document["sampled"] == 4 and "process 1 of 2" in done.stderr
    assert recorded(tmp_path / "two") == [2, 2]
    alone(tiny_folder, "one")
    assert images(tmp_path / "two") == images(tmp_path / "one")
    one, two = ((tmp_path / name / "manifest.jsonl").read_text() for name in ("one", "two"))
    assert one == two


def test_nothing_is_lost_or_redone_after_a_kill(tiny_folder, tmp_path, monkeypatch, together):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path, MANY)
    out = tmp_path / "killed"
    processes = together("-m", "studio", *command(tiny_folder, "killed"))
    deadline = time.monotonic() + 600
    while min(recorded(out), default=0) < 2 or len(recorded(out)) < 2:
        assert all(process.poll() is None for process in processes), "a process ended before it was killed"
        assert time.monotonic() < deadline, f"waited for two images of each process: {recorded(out)}"
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 4 <= sum(recorded(out)) < len(MANY) and not (out / "manifest.jsonl").exists()
    assert len(before) >= sum(recorded(out)) - 2  # a process that was just renaming has a record and no image

    alone(tiny_folder, "killed")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    alone(tiny_folder, "whole")
    assert len(images(out)) == len(MANY) and images(out) == images(tmp_path / "whole")
    assert (out / "manifest.jsonl").read_text() == (tmp_path / "whole" / "manifest.jsonl").read_text()
    assert not list(out.glob("*.part"))
