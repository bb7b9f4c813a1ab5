"""The README is short, its Python runs, its make targets exist, and its numbers are those of the benchmarks."""

import math
import re

import pytest
from safetensors import safe_open

from studio.checkpoints.bundled import BUNDLED, bundled_folder
from tests.documents import ROOT, blocks, is_number, tables

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
REASONS = re.findall(
    r"^- \*\*.+?(?=\n- |\n\n)", README.partition("\n## Three reasons\n")[2].partition("\n## ")[0], re.M | re.S
)


def make_targets():
    lines = [line for block in blocks(README + CONTRIBUTING, "sh") for line in block.splitlines()]
    return sorted({line.split()[1] for line in lines if line.startswith("make ")})


def numbers_of(command):
    """The numbers in the tables that a command printed."""
    [block] = re.findall(rf"<!-- printed by: {re.escape(command)} -->(.*?)<!-- end -->", BENCHMARKS, re.S)
    return {float(cell) for table in tables(block) for row in table for cell in row if is_number(cell)}


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_first_screen_says_how_to_start():
    head = "\n".join(README.splitlines()[:40])
    assert "\nmake demo " in head and "\nmake test " in head and "](docs/gallery.jpg)" in head


@pytest.mark.parametrize("snippet", blocks(README, "python"))
def test_python_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "apple.png").is_file()


@pytest.mark.parametrize("target", make_targets())
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_there_are_three_reasons():
    assert len(REASONS) == 3


@pytest.mark.parametrize("reason", REASONS)
def test_numbers_of_a_reason_are_those_that_its_command_printed(reason):
    text, command = re.fullmatch(r"(.+?)`(studio bench [^`]+)`", reason, re.S).groups()
    found = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)}
    assert len(found) >= 2 and not found - numbers_of(command)


def test_images_of_the_documents_are_small():
    sizes = {file.name: file.stat().st_size for file in (ROOT / "docs").glob("*.[jp][pn]g")}
    assert sizes and max(sizes.values()) < 300_000


def _millions(folder):
    """Parameters of the weight files of a folder itself, in millions."""
    counted = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            counted += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return f"{counted / 1e6:.1f} M"


def test_the_table_of_bundled_models_counts_their_parameters():
    lines = (ROOT / "docs" / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| [`emoji-")]
    assert {row[0].split("`")[1] for row in rows} == set(BUNDLED)
    for name, *_, said in rows:
        folder = bundled_folder(name.split("`")[1])
        main = folder / "transformer" if (folder / "transformer").is_dir() else folder
        parts = {part: folder / part for part in ("student", "drafter", "compressor") if (folder / part).is_dir()}
        more = ", ".join(f"{part} {_millions(path)}" for part, path in parts.items())
        assert said == _millions(main) + (f" ({more})" if more else "")
