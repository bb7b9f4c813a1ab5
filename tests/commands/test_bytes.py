"""Words and paths that are not UTF-8, given on a real command line: `pytest -m slow tests/commands/test_bytes.py`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture
def studio(tmp_path, repository):
    """Run a command in an empty folder with arguments of any bytes, and a terminal of an encoding."""

    def call(*arguments, encoding="utf-8"):
        environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONIOENCODING": encoding}
        command = [os.fsencode(argument) for argument in (sys.executable, "-m", "studio", *arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert b"Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


def test_a_prompt_that_is_not_utf8_is_refused(studio, tmp_path, tiny_folder):
    code, out, _ = studio("generate", b"a red \xff apple", "--model", tiny_folder, "--json")
    assert code == 2 and "not valid Unicode" in json.loads(out)["error"]
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_written_and_told(studio, tmp_path, tiny_folder):
    code, out, _ = studio(
        "generate", "a red apple", "--model", tiny_folder, "--out", b"\xff.png", "--json", "--seed", "1"
    )
    path = json.loads(out)["images"][0]["path"]
    assert code == 0 and os.fsencode(path) == b"\xff.png" and (tmp_path / path).is_file()
    code, out, _ = studio("generate", "a red apple", "--model", tiny_folder, "--out", b"\xfe.png", encoding="ascii")
    assert code == 0 and rb"\udcfe.png" in out


def test_a_compressed_file_of_such_a_name_is_restored(studio, tmp_path, tiny_one_d):
    tiny_one_d.save_pretrained(tmp_path / "model")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(os.fsencode(tmp_path) + b"/\xff.png")
    code, out, _ = studio("tokenize", b"\xff.png", "-o", b"\xff.odp", "--tokenizer", "model", "--json")
    assert code == 0 and os.fsencode(json.loads(out)["path"]) == b"\xff.odp"
    code, out, _ = studio("detokenize", b"\xff.odp", "-o", b"\xfe.png", "--tokenizer", "model", "--json")
    assert code == 0 and json.loads(out)["width"] == 16 and os.path.isfile(os.fsencode(tmp_path) + b"/\xfe.png")
