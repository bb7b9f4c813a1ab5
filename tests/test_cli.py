"""The command line as a whole: help, wrong commands, models, doctor, and what is kept off stdout."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.command_results import files, refused


def test_errors_under_json_are_one_document_too(run, tiny_folder):
    code, out, err = run("generate", "", "--model", tiny_folder, "--json")
    assert code == 2 and set(json.loads(out)) == {"error"}
    assert err.splitlines()[-1] == f"Error: {json.loads(out)['error']}"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["bench"], ["convert"], ["data"], ["train"], ["train", "nonsense"], ["evaluate", "nonsense"]],
)
def test_wrong_commands_are_refused(run, tmp_path, arguments):
    refused(run(*arguments))
    assert files(tmp_path) == []


def test_models_lists_every_bundled_model(run):
    code, out, _ = run("models", "--json")
    assert code == 0
    sample, cut = (
        {"emoji-ar", "emoji-1d-ar", "emoji-bridge", "emoji-mar", "emoji-resgen"},
        {"emoji-vq", "emoji-1d", "emoji-rvq", "emoji-kl"},
    )
    assert {row["name"] for row in json.loads(out)["models"]} == sample | cut | {"emoji-vlm", "emoji-judge"}


def test_doctor_reports_versions_and_weights(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["ok"]
    assert report["versions"]["torch"] and report["device"] and report["compiled_step"] == "ok"
    assert {row["state"] for row in report["models"]} == {"ok"}
    code, out, _ = run("doctor")
    weights = [name for row in report["models"] for name in row["sha256"].items() if name[0].endswith(".safetensors")]
    assert code == 0 and len(weights) >= 4 and all(f"{checksum}  {file}\n" in out for file, checksum in weights)


def test_doctor_names_damaged_weights_in_its_document_too(run, monkeypatch):
    from studio import doctor

    rows = [{"name": "emoji-ar", "state": "damaged", "sha256": {}}]
    monkeypatch.setattr(doctor, "list_models", lambda: rows)
    code, out, err = run("doctor", "--json")
    report = json.loads(out)
    assert code == 2 and report["models"] == rows and not report["ok"] and "damaged" in report["error"]
    assert err.splitlines()[-1] == f"Error: {report['error']}"


@pytest.mark.parametrize("kind", ["llamagen-vq", "llamagen-c2i", "llamagen-t2i", "lantern-drafter", "distilled"])
def test_convert_refuses_what_is_no_checkpoint(run, tmp_path, kind):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    options = ["--tokenizer", "model.pt"] if kind in ("llamagen-c2i", "llamagen-t2i") else []
    options += ["--text-encoder", tmp_path] if kind == "llamagen-t2i" else []
    refused(run("convert", kind, "model.pt", "converted", *options), "model.pt")
    assert files(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("out", ["/proc/nowhere/emoji.zip", "/dev/null/emoji.zip", "folder.zip", "photo.png"])
def test_an_archive_that_cannot_be_written_is_refused_before_it_is_made(run, tmp_path, monkeypatch, out):
    from studio.data import build

    monkeypatch.setattr(build, "build_archive", lambda *_: pytest.fail("it was made"))
    (tmp_path / "folder.zip").mkdir()
    refused(run("data", "build", out), out)
    assert files(tmp_path) == ["folder.zip"]


def test_a_pipeline_that_reads_no_images_is_not_asked(run, tiny_folder, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "scene.png")
    refused(run("ask", "scene.png", "What is there?", "--model", tiny_folder), "reads no images: use emoji-vlm")


def test_no_command_shows_the_help(run):
    code, out, _ = run()
    assert code == 0 and "generate" in out


def test_library_output_does_not_reach_stdout_under_json(run, monkeypatch):
    from studio import doctor

    def noisy():
        print("printed")
        os.write(1, b"written by a compiled library\n")
        return []

    monkeypatch.setattr(doctor, "list_models", noisy)
    _, out, err = run("models", "--json")
    assert json.loads(out) == {"models": []}
    assert "printed" in err and "compiled" in err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("models > /dev/full", 2, "No space left on device"),
        ("models --json > /dev/full", 2, "No space left on device"),
        ("--help > /dev/full", 2, "No space left on device"),
        ("models | true", 141, ""),
        ("models --json | true", 141, ""),
        ("models >&-", 0, ""),
        ("models --json >&-", 0, ""),
        ("models --json 2> /dev/full | cat > document.json", 0, ""),
        ("nonsense 2>&-", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_told_in_one_sentence(tmp_path, arguments, code, told):
    command = f"{sys.executable} -m studio {arguments}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode == code and "Traceback" not in done.stderr and done.stdout == "", done.stderr
    assert errors == ([f"Error: The output cannot be written ({told})."] if told else [])
    if (tmp_path / "document.json").exists():
        assert json.loads((tmp_path / "document.json").read_text())["models"]


def test_a_document_is_written_whole_where_stdout_takes_a_part_at_a_time(run, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    code, out, _ = run("models", "--json")
    assert code == 0 and json.loads(out)["models"]
