"""A decoding in one file, with one entry in the registry, is on the command line, in prompt files and in the app."""

import json
import os
import subprocess
import sys

import pytest

TOY = '''
"""A toy acceptance rule: a draft passes where the target gives it at least a threshold."""

from dataclasses import dataclass

from studio.decoding.registry import DECODINGS, DecodingChoice, Option

DECODINGS["threshold"] = DecodingChoice(
    "Threshold",
    "A draft passes where it is likely enough.",
    "toy:Threshold",
    (Option("threshold", float, 0.25, "How likely a draft must be, 0 to 1."),),
)


def __getattr__(name):
    from studio.decoding.eagle import AutoDrafts
    from studio.decoding.speculative import Speculative
    from studio.decoding.verification import Acceptance, Lossless

    class Rule(Lossless):
        def __init__(self, threshold):
            self.threshold = threshold

        def probs(self, p, tokens, q=None):
            found = super().probs(p, tokens, q)
            likely = p.gather(1, tokens.clamp(min=0)) >= self.threshold
            return Acceptance(likely.to(p.dtype), found.tried, p)

    @dataclass(frozen=True, kw_only=True)
    class Threshold(Speculative):
        threshold: float = 0.25
        drafts: AutoDrafts = AutoDrafts()

        def rule(self, codebook):
            return Rule(self.threshold)

    return {"Threshold": Threshold}[name]
'''

PROGRAM = """
import json, os, sys, tempfile
import toy
from studio.cli import main

def output(*arguments):
    # What a command writes to the file of stdout.
    with tempfile.TemporaryFile() as file:
        real = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            main([*arguments])
        except SystemExit as ended:
            assert not ended.code, arguments
        finally:
            sys.stdout.flush()
            os.dup2(real, 1)
        file.seek(0)
        return file.read().decode()

model, lines = sys.argv[1:]
found = {"help": output("generate", "--help")}
for threshold in ("0", "1"):
    call = ("generate", "a red apple", "--model", model, "--seed", "1", "--top-k", "9", "--json")
    found[threshold] = json.loads(output(*call, "--decoding", "threshold", "--threshold", threshold))
from studio.commands.prompt_file import read_prompts
found["line"] = read_prompts(lines)[0].decoding
import gradio as gr
from studio.ui.tabs.generate import _decoding_fields
from studio.pipelines.llamagen import LlamaGenPipeline
from studio import decodings_for
with gr.Blocks():
    decoding, fields = _decoding_fields(decodings_for(LlamaGenPipeline.__name__, ()))
found["titles"] = [title for title, _ in decoding.choices]
found["label"] = fields["threshold", "threshold"].label
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory, repository):
    """What a process finds that imports the toy before the command line."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY)
    line = {"prompt": "a red apple", "decoding": "threshold", "threshold": 0.5}
    (folder / "lines.jsonl").write_text(json.dumps(line))
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{repository}", "STUDIO_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_folder, folder / "lines.jsonl"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_command_line_has_it(found):
    words = " ".join(found["help"].split())
    assert "threshold: How likely a draft must be, 0 to 1." in words and "--threshold" in words
    assert "lantern++, distilled, threshold" in words
    never, always = found["1"], found["0"]
    assert never["decoding"] == always["decoding"] == "threshold"
    assert never["target_calls"] == 16 > always["target_calls"]


def test_a_prompt_file_has_it(found):
    assert found["line"] == {"name": "threshold", "threshold": 0.5}


def test_the_app_has_it(found):
    assert "Threshold" in found["titles"] and found["label"] == "Threshold"


def test_others_have_it_not():
    from studio import DECODINGS

    assert "threshold" not in DECODINGS
