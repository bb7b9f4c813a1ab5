"""The documents tell no lies: their Python runs, their commands parse, their links and files are there."""

import re
from pathlib import Path

import pytest

from studio.bench.report import printed_by
from studio.checkpoints.bundled import BUNDLED
from tests.documents import (
    CARD_FILES,
    DOCUMENTS,
    ROOT,
    blocks,
    commands,
    dead_links,
    help_parses,
    is_benchmark,
    named_commands,
    parse,
    tables,
    training_commands,
)

TEXTS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in DOCUMENTS}
PAGES = {Path(name).name: text for name, text in TEXTS.items() if name.startswith("docs/")}
LINES = sorted({line for text in TEXTS.values() for line in commands(text)})
CARDS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in CARD_FILES}
CARD_LINES = sorted({line for text in CARDS.values() for line in training_commands(text)})
BENCHMARKS = "docs/benchmarks.md"


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks(PAGES[page], "python"), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert "studio" in names


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text, "py")])
def test_python_that_needs_more_than_the_package_compiles(name):
    for block in blocks(TEXTS[name], "py"):
        assert compile(block, name, "exec").co_names


@pytest.mark.parametrize("line", [*LINES, *CARD_LINES])
def test_command_parses(line):
    """Its command and options exist; what a decoding, a kind or a preset is called, and what goes with it, is right."""
    from studio.commands.decodings import decoding_of, given
    from studio.decoding.registry import DECODINGS
    from studio.training import KINDS
    from studio.training.options import preset_names

    options = parse(line)
    if line.startswith("studio train "):
        assert options["kind"] in (None, *KINDS)
        assert options["preset"] in (None, "family", *preset_names())
        assert options["kind"] or options["preset"] or options["config"]
    if options.get("decoding") not in (None, "auto"):
        names = {option.name for choice in DECODINGS.values() for option in choice.options}
        assert decoding_of(**given(options["decoding"], **{name: options.get(name) for name in names}))


@pytest.mark.parametrize("name", TEXTS)
def test_commands_in_sentences_exist(name):
    assert not [line for line in named_commands(TEXTS[name]) if not help_parses(line)]


def test_a_command_that_does_not_exist_is_noticed():
    assert named_commands("`studio paint x`, `studio bench decoding --quick`") == [
        "studio bench decoding",
        "studio paint x",
    ]
    assert help_parses("studio bench decoding") and not help_parses("studio paint x")
    assert not help_parses("studio bench painting")


def test_every_card_says_what_made_the_model():
    """In commands that `test_command_parses` reads, whole ones with their options."""
    assert len(CARDS) == len(BUNDLED) + 3  # a student and two drafters have cards of their own
    assert not [name for name, text in CARDS.items() if not re.search(r"^\| Made by \| .*`studio train ", text, re.M)]
    assert training_commands("`studio train vq --out a`, by `studio train`\n`studio train\n--preset emoji-vq`") == [
        "studio train --preset emoji-vq",
        "studio train vq --out a",
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_lead_to_files_and_headings(name):
    assert not dead_links(ROOT / name)


def test_dead_links_are_noticed(tmp_path):
    (tmp_path / "page.md").write_text(
        "# Title\n[a](gone.md) [b](page.md#title) [c](#nothing) [d](https://example.org)\n"
    )
    assert dead_links(tmp_path / "page.md") == ["gone.md", "#nothing"]


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    named = re.findall(r"`((?:tests|studio|pipelines|tokenizers|ui|examples)/[\w./-]+)`", TEXTS[name])
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_index_leads_to_every_page_and_the_readme_to_the_index():
    index = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["README.md"]))
    assert index == set(PAGES) - {"README.md"}
    assert "](docs/README.md)" in TEXTS["README.md"]


@pytest.mark.parametrize("name", [name for name in TEXTS if name != BENCHMARKS])
def test_tables_of_measurements_stand_in_one_page(name):
    assert not printed_by(TEXTS[name])
    assert not [table[0] for table in tables(TEXTS[name]) if is_benchmark(table)]


def test_every_table_of_the_benchmarks_is_printed_by_a_command():
    printed = printed_by(TEXTS[BENCHMARKS])
    blocks = re.findall("<!-- printed by: .*?<!-- end -->", TEXTS[BENCHMARKS], re.DOTALL)
    assert len(blocks) == len(printed) == len(set(printed)) >= 10
    assert all(any(map(is_benchmark, tables(block))) for block in blocks)
    in_blocks = sum(is_benchmark(table) for block in blocks for table in tables(block))
    assert in_blocks == sum(map(is_benchmark, tables(TEXTS[BENCHMARKS])))


@pytest.mark.parametrize("command", printed_by(TEXTS[BENCHMARKS]))
def test_what_prints_a_table_parses(command):
    assert parse(command)
