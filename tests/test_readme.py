"""What the README shows works: its Python runs, its commands exist with those options, its links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from documents import ROOT, blocks, commands, dead_links, parse

from studio.bench.report import printed_by

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
TEXT = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
PAGES = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]


def make_targets():
    lines = [line for block in blocks(TEXT, "sh") for line in block.splitlines()]
    return sorted({line.split()[1] for line in lines if line.startswith("make ")})


@pytest.mark.parametrize("snippet", blocks(TEXT, "python"))
def test_python_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "apple.png").is_file()


@pytest.mark.parametrize("line", commands(TEXT))
def test_command_parses(line):
    assert parse(line)


@pytest.mark.parametrize("command", sorted({*printed_by(TEXT), *(c for page in PAGES for c in printed_by(page))}))
def test_what_prints_a_table_parses(command):
    assert parse(command)


@pytest.mark.parametrize("target", make_targets())
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name):
    assert not dead_links(ROOT / name)
