"""Published models by name, against a stand-in of the Hub: downloaded, converted, resumed, refused in a sentence."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from studio.checkpoints import published
from studio.checkpoints.published import PUBLISHED, pull
from studio.errors import StudioError
from studio.tokenizers.vq import VQTokenizer
from tests.checkpoints.hub_stand_in import StandIn

DRIVER = """
import sys
import huggingface_hub.constants as constants
from studio.checkpoints import published as p
constants.DOWNLOAD_CHUNK_SIZE = 10_000  # so that small files are resumed as large ones are
files = (("authors/tiny", "gpt.pt"), ("authors/tiny", "vq.pt"))
p.PUBLISHED["tiny"] = p.Published("a tiny LlamaGen", "MIT", files, p._llamagen("c2i", 4), "https://example.org/tiny")
p.PUBLISHED["strict"] = p.Published("a tiny one", "CC-BY-NC", files, p._llamagen("c2i", 4), is_commercial=False)
p.PUBLISHED["gone"] = p.Published("one without files", "MIT", (("authors/tiny", "gone.pt"),), p._llamagen_vq)
p.PUBLISHED["wrong"] = p.Published("a wrong file", "MIT", (("authors/tiny", "wrong.pt"),), p._llamagen_vq)
from studio.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def files(tiny_class_pipeline):
    """The tiny pipeline's weights as the authors' files hold them."""

    def saved(module):
        stream = io.BytesIO()
        torch.save({"model": module.state_dict()}, stream)
        return stream.getvalue()

    torch.manual_seed(0)
    sizes = {"base_channels": 32, "channel_multipliers": (1, 1, 1), "z_channels": 32, "code_dim": 4}
    blocks = {"encoder_res_blocks": 1, "decoder_res_blocks": 1}
    tokenizer = VQTokenizer(codebook_size=64, sample_size=16, **sizes, **blocks)
    parts = {"gpt.pt": saved(tiny_class_pipeline.transformer), "vq.pt": saved(tokenizer)}
    return {**parts, "wrong.pt": b"no weights" * 1000, "README.md": b"tiny"}


@pytest.fixture
def hub(files):
    with StandIn({"authors/tiny": dict(files)}) as stand_in:
        yield stand_in


@pytest.fixture
def studio(hub, tmp_path, repository):
    """Runs the command line with tiny published models, in an empty folder; its exit code, stdout and stderr."""

    def run(*arguments, **environment):
        variables = {
            **os.environ, "PYTHONPATH": str(repository), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"), "STUDIO_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
            **environment,
        }  # fmt: skip
        command = [sys.executable, "-c", DRIVER, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_name_becomes_images(studio, hub, tmp_path):
    code, out, err = studio("pull", "tiny", "--json")
    folder = tmp_path / "cache" / "models" / "tiny"
    assert code == 0, err
    assert json.loads(out) == {"name": "tiny", "folder": str(folder), "pulled": True}
    assert "licence   MIT" in err and "authors/tiny" in err and "size" in err
    record = json.loads((folder / "pulled.json").read_text())
    assert [part["file"] for part in record["files"]] == ["gpt.pt", "vq.pt"]
    assert all(part["sha256"] and part["revision"] for part in record["files"])
    served = dict(hub.served)
    generate = ("generate", "--model", "tiny", "--class-label", "3", "--out", "made.png")
    assert studio(*generate, HF_HUB_OFFLINE="1")[0] == 0
    assert (tmp_path / "made.png").is_file() and hub.served == served
    assert "was there" in studio("pull", "tiny")[1] and hub.served == served


def test_the_first_use_of_a_name_pulls_it(studio, tmp_path):
    code, _, err = studio("generate", "--model", "tiny", "--class-label", "3", "--out", "made.png")
    assert code == 0 and (tmp_path / "made.png").is_file() and "licence: MIT" in err


def test_a_broken_connection_is_resumed(studio, hub):
    hub.breaks = 2
    assert studio("pull", "tiny")[0] == 0 and any(start > 0 for start in hub.ranges)


def test_a_pull_that_failed_goes_on_with_the_files_that_are_missing(studio, hub, tmp_path, files):
    whole, hub.repositories["authors/tiny"]["vq.pt"] = files["vq.pt"], b""
    hub.failing = {"vq.pt"}
    code, _, err = studio("pull", "tiny")
    assert code == 2 and "authors/tiny cannot be downloaded" in err and "Traceback" not in err
    assert not (tmp_path / "cache" / "models" / "tiny").exists()
    hub.failing, hub.repositories["authors/tiny"]["vq.pt"] = set(), whole
    assert studio("pull", "tiny")[0] == 0
    assert hub.served["gpt.pt"] == len(files["gpt.pt"]) and hub.served["vq.pt"] == len(whole)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gone", None, "has no file gone.pt any more"),
        ("wrong", None, "not a checkpoint of weights"),
        ("tiny", "gated", "asks for an agreement"),
        ("tiny", "offline", "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pulled_is_one_sentence(name, change, words, studio, hub, tmp_path):
    if change == "gated":
        hub.gated.add("authors/tiny")
    code, out, err = studio("pull", name, **({"HF_HUB_OFFLINE": "1"} if change == "offline" else {}))
    assert code == 2 and words in err and "Traceback" not in err
    assert not list((tmp_path / "cache").glob("models/*"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "There is no published model 'nothing'"),
        ("strict", "add --accept-licence"),
        ("mar-b", "download them from https://github.com/LTH14/mar and run `studio convert mar"),
    ],
)
def test_what_is_not_even_asked_for(name, words, monkeypatch, tmp_path):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    strict = dataclasses.replace(PUBLISHED["llamagen-vq-16"], is_commercial=False)
    monkeypatch.setitem(PUBLISHED, "strict", strict)
    monkeypatch.setattr(published, "_planned", lambda repository, file: pytest.fail("asked"))
    with pytest.raises(StudioError, match=words):
        pull(name)


def test_a_licence_is_accepted_and_downloads_are_deleted(studio, tmp_path):
    code, _, err = studio("pull", "strict", "--accept-licence", "--delete-downloads")
    assert code == 0 and "CC-BY-NC" in err
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.stat().st_size > 10_000]


def test_too_little_room_is_said_before_anything_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    plan = {"repository": "a/b", "file": "c", "revision": "d", "bytes": 10**15}
    monkeypatch.setattr(published, "_planned", lambda repository, file: plan)
    monkeypatch.setattr(published, "_downloaded", lambda part: pytest.fail("downloaded"))
    with pytest.raises(StudioError, match="needs about .* GB .* make room"):
        pull("llamagen-b-256")


def test_every_entry_can_be_pulled_or_says_how_to_get_it():
    for name, about in PUBLISHED.items():
        assert about.licence and about.summary and about.page.startswith("https://"), name
        assert bool(about.files) == (about.convert is not None) == (not about.by_hand), name


def test_the_list_says_what_is_pulled(capsys, monkeypatch, tmp_path):
    from studio.cli import main

    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    (tmp_path / "models" / "mar-b").mkdir(parents=True)
    (tmp_path / "models" / "mar-b" / "pulled.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["models", "--published"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PUBLISHED) and any(line.split()[:2] == ["mar-b", "pulled"] for line in lines)
    assert all("licence" in line for line in lines)
