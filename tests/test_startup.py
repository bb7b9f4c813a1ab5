"""What must be quick: the command line before it runs a model."""

import subprocess
import sys
import time

import pytest


@pytest.mark.alone
def test_help_answers_in_half_a_second(repository):
    def seconds():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "studio", "--help"], cwd=repository, check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


def test_the_command_line_imports_no_heavy_library(repository):
    code = "import studio.cli, sys; print({'torch', 'diffusers', 'transformers', 'gradio', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
