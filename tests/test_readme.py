"""What the README shows works: its Python runs, its commands exist with those options, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from studio import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}


def blocks(language):
    return [
        block for text in DOCUMENTS.values() for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    ]


def commands():
    lines = {line.partition(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()}
    return sorted(line for line in lines if line.startswith("studio "))


def make_targets():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return sorted({line.split()[1] for line in lines if line.startswith("make ")})


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "apple.png").is_file()


@pytest.mark.parametrize("line", commands())
def test_command_parses(line):
    command, arguments = typer.main.get_command(cli.app), shlex.split(line)[1:]
    context = command.make_context("studio", list(arguments), resilient_parsing=True)
    while getattr(command, "commands", None):
        name, arguments = arguments[0], arguments[1:]
        assert name in command.commands, line
        command = command.commands[name]
    command.make_context(name, list(arguments), parent=context)


@pytest.mark.parametrize("target", make_targets())
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", DOCUMENTS[name])
    assert not [link for link in links if not (ROOT / link).exists()]
