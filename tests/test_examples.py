"""The scripts in examples/ run as a reader would start them, with tiny models."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Run a script with arguments in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


@pytest.fixture
def image(tmp_path):
    Image.radial_gradient("L").resize((40, 24)).convert("RGB").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_generate(example, tiny_folder, tmp_path):
    printed = example("generate.py", "a red apple", "--model", tiny_folder, "--num-images", "2")
    assert printed.startswith("2 images in ") and " 16 calls " in printed
    assert [Image.open(tmp_path / "out" / f"{seed}.png").size for seed in (0, 1)] == [(16, 16)] * 2


def test_compare_decodings(example, tiny_folder):
    lines = example("compare_decodings.py", "a red apple", "--model", tiny_folder).splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "jacobi", "speculative", "lantern"]
    assert int(lines[0].split()[1]) == 16 and lines[0].endswith("equal tokens") and lines[1].endswith("equal tokens")


def test_tokenize_image(example, tiny_one_d, image, tmp_path):
    tiny_one_d.save_pretrained(tmp_path / "tiny")
    arguments = ("--tokenizer", tmp_path / "tiny", "--lengths", "2", "6")
    lines = example("tokenize_image.py", image, *arguments).splitlines()
    assert [line.split()[0] for line in lines] == ["2", "6"]
    assert Image.open(tmp_path / "out" / "6.png").size == (40, 24)
    assert (tmp_path / "out" / "2.odp").stat().st_size < (tmp_path / "out" / "6.odp").stat().st_size


def test_prune_questions(example, tiny_reader, image, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path / "tiny")
    lines = example("prune_questions.py", image, "red apple", "--model", tmp_path / "tiny").splitlines()
    kept = [int(line.split()[0]) for line in lines]
    assert len(kept) == 4 and kept == sorted(kept, reverse=True) and kept[0] > kept[-1]


def test_train_tokenizer(example, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(10):
        Image.radial_gradient("L").rotate(36 * number).resize((16, 16)).convert("RGB").save(
            tmp_path / "photos" / f"{number}.png"
        )
    sizes = ("--size", "16", "--grid", "4", "--steps", "1", "--batch-size", "2")
    printed = example("train_tokenizer.py", tmp_path / "photos", *sizes)
    assert "0.png: 16 tokens" in printed
    assert Image.open(tmp_path / "runs" / "tokenizer" / "restored.png").size == (16, 16)
