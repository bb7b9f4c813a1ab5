"""`studio train` on a folder of images: what it leaves, what it prints, and every mistake in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio.files import only_one_run
from studio.training import loop
from studio.training.state import load_state

TINY = ["--size", "16", "--grid", "4", "--dim", "32", "--codes", "16", "--layers", "1", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "VALIDATION_BATCHES", 1)


@pytest.fixture
def photos(image_folder):
    return image_folder(10)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(result, words):
    code, out, err = result
    lines = err.splitlines()
    assert code == 2 and not out and lines[-1].startswith("Error: ") and words in lines[-1]
    assert "Traceback" not in err and not any(line.startswith("Error: ") for line in lines[:-1])


def test_a_run_leaves_its_folder_and_names_what_it_could_not_read(run, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    asked = ["train", "vq", "--data", photos, *TINY, "--steps", "2", "--sample-every", "1"]
    code, out, _ = run(*asked, "--out", "vq")
    assert code == 0 and "1 files could not be read and were left out:\n  broken.png: " in out
    assert "quality psnr" in out and "validation_loss" in out
    assert names(tmp_path / "vq") == ["metrics.csv", "model", "options.json", "samples", "state-000000002"]
    assert names(tmp_path / "vq" / "samples") == ["000001.png", "000002.png"]
    card = (tmp_path / "vq" / "model" / "README.md").read_text()
    assert "9 images to train, 1 to validate, 1 unreadable files left out; licence: not stated" in card
    refused(run(*asked, "--out", "vq"), "holds an earlier run; add --resume")
    refused(run(*asked, "--out", "vq", "--resume", "--seed", "1"), "another seed")
    code, out, err = run(*asked, "--out", "vq", "--resume", "--steps", "3", "--json")
    result = json.loads(out)
    assert code == 0 and result["steps"] == 3 and result["skipped"][0].startswith("broken.png: ")
    assert load_state(tmp_path / "vq")[0] == 3


def test_a_file_of_options_and_flags_that_win(run, photos, tmp_path):
    (tmp_path / "options.toml").write_text(
        f'kind = "vq"\ndata = "{photos}"\nsize = 16\ngrid = 4\ndim = 32\ncodes = 16\nlayers = 1\nbatch_size = 2\n'
        "steps = 50\naccumulate = 2\nflip = true\n[model]\ncode_dim = 4\n"
    )
    code, _, _ = run("train", "--config", "options.toml", "--steps", "1", "--learning-rate", "0.001")
    assert code == 0
    options = json.loads((tmp_path / "runs" / "photos-vq" / "options.json").read_text())
    assert (
        options["steps"] == 1 and options["accumulate"] == 2 and options["flip"] and options["learning_rate"] == 0.001
    )
    config = json.loads((tmp_path / "runs" / "photos-vq" / "model" / "config.json").read_text())
    assert config["code_dim"] == 4 and config["codebook_size"] == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Say what to train: studio train KIND, or --preset NAME."),
        (["vqgan"], "There is no kind 'vqgan'; choose one of vq, "),
        (["--preset", "nonsense"], "There is no preset 'nonsense'; choose one of "),
        (["vq", "--steps", "0"], "--steps"),
        (["vq", "--steps", "many"], "--steps"),
        (["vq", "--steps", "1", "--minutes", "1"], "Say how long with steps or with minutes"),
        (["vq", "--minutes", "0"], "minutes must be a finite number above 0"),
        (["vq", "--minutes", "nan"], "--minutes"),
        (["vq", "--data", "nowhere"], "There is no folder nowhere: give --data a folder of images, or emoji."),
        (["vq", "--data", "FOLDER", "--crop", "middle"], "--crop is one of centre, random, none"),
        (["vq", "--data", "FOLDER", "--size", "24", "--grid", "5"], "power of two"),
        (["vq", "--data", "FOLDER", "--tokens", "5"], "vq does not take --tokens: leave that out."),
        (["vq", "--data", "FOLDER", "--init-from", "nowhere"], "There is no model nowhere"),
        (["vq", "--data", "FOLDER", "--init-from", "FOLDER"], "holds no weights of such a vq to start from"),
        (["vq", "--data", "FOLDER", "--resume"], "holds no state to resume; start without --resume."),
        (["vq", "--data", "FOLDER", "--tracker", "abacus"], "There is no tracker 'abacus'"),
        (["vq", "--flip"], "leave out --crop and --flip"),
        (["judge", "--data", "FOLDER"], "leave out --data"),
        (["reader", "--data", "FOLDER"], "leave out --data"),
        (["llamagen", "--data", "FOLDER"], "needs an image tokenizer (VQTokenizer or OneDPieceTokenizer)"),
        (["text-encoder", "--data", "FOLDER"], "name a VQ with --tokenizer"),
        (["student"], "name it with --target"),
        (["vq", "--config", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["vq", "--config", "wrong.toml"], "wrong.toml has no option batchsize"),
        (["vq", "--config", "type.toml"], "size must be a whole number from 8 to 4096, not '16'."),
        (["vq", "--data", "FOLDER", "--config", "table.toml"], "[model] of vq has no depth"),
        (["--preset", "family"], "--minutes M"),
        (["--preset", "family", "--minutes", "1", "--size", "16"], "decide size: leave that out."),
        (["--preset", "family", "--minutes", "1", "--config", "table.toml"], "decide config: leave that out."),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(run, photos, tmp_path, arguments, words):
    (tmp_path / "wrong.toml").write_text("batchsize = 3")
    (tmp_path / "type.toml").write_text('size = "16"')
    (tmp_path / "table.toml").write_text("[model]\ndepth = 3")
    before = names(tmp_path)
    refused(run("train", *(str(photos) if word == "FOLDER" else word for word in arguments)), words)
    assert set(names(tmp_path)) <= {*before, "cache"}


def test_a_family_is_not_half_asked_for(run):
    refused(run("train", "vq", "--preset", "family", "--minutes", "1"), "decide kind: leave that out.")


@pytest.mark.parametrize("metadata", ['{"file_name": "gone.png", "text": "a"}', '{"file_name": "000.png"}', "{"])
def test_bad_captions_are_one_sentence_and_leave_nothing(run, photos, tmp_path, metadata):
    (photos / "metadata.jsonl").write_text(metadata)
    refused(run("train", "vq", "--data", photos, *TINY, "--steps", "1", "--out", "vq"), str(photos))
    assert not (tmp_path / "vq").exists()


def test_two_runs_do_not_write_to_one_folder(run, photos, tmp_path):
    arguments = ["train", "vq", "--data", photos, *TINY, "--steps", "1", "--out"]
    with only_one_run(tmp_path / "vq"):
        refused(run(*arguments, "vq"), "Another run writes to vq: wait for it, stop it, or give another --out.")
        assert not (tmp_path / "vq").exists()
        assert run(*arguments, "other")[0] == 0
    assert run(*arguments, "vq")[0] == 0


def test_in_a_process_of_its_own(photos, tmp_path):
    """As a user starts it: exit code 2 and one sentence on stderr, or 0 and one JSON document on stdout."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(kind, *arguments):
        command = [sys.executable, "-m", "studio", "train", kind, "--data", str(photos), *TINY, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    done = start("vq", "--steps", "1", "--out", "run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 1
    wrong = start("vqgan", "--out", "other")
    assert wrong.returncode == 2 and not wrong.stdout and not (tmp_path / "other").exists()
    assert wrong.stderr.startswith("Error: There is no kind 'vqgan'; choose one of vq, ")
    assert wrong.stderr.count("\n") == 1


def test_without_the_extra_one_sentence_says_what_to_install(run, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    monkeypatch.delitem(sys.modules, "studio.training.vq", raising=False)
    refused(run("train", "vq", "--data", photos, *TINY, "--out", "vq"), 'pip install "token-studio[train]"')
    assert not (tmp_path / "vq").exists()
