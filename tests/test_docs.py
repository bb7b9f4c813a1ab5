"""The pages on methods tell no lies: their Python runs, their commands parse, their links and tests are there."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from documents import ROOT, blocks, commands, dead_links, parse

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
LINES = sorted({line for text in PAGES.values() for line in commands(text)})


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks(PAGES[page], "python"), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert "studio" in names


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "py")])
def test_python_that_needs_published_weights_compiles(page):
    for block in blocks(PAGES[page], "py"):
        assert compile(block, page, "exec").co_names


@pytest.mark.parametrize("line", LINES)
def test_command_parses(line):
    """Its command and options exist; what a decoding, a kind or a preset is called, and what goes with it, is right."""
    from studio.commands.decodings import decoding_of, given
    from studio.decoding.registry import DECODINGS
    from studio.training import KINDS
    from studio.training.options import preset_names

    options = parse(line)
    if line.startswith("studio train "):
        assert options["kind"] in (None, *KINDS) and options["preset"] in (None, "family", *preset_names())
        assert options["kind"] or options["preset"] or options["config"]
    if options.get("decoding") not in (None, "auto"):
        names = {option.name for choice in DECODINGS.values() for option in choice.options}
        assert decoding_of(**given(options["decoding"], **{name: options.get(name) for name in names}))


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page):
    assert not dead_links(ROOT / "docs" / page)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = re.findall(r"`((?:tests|studio|pipelines|tokenizers|ui)/[\w./-]+)`", PAGES[page])
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_index_leads_to_every_page_and_the_readme_to_the_index():
    index = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["README.md"]))
    assert index == set(PAGES) - {"README.md"}
    assert "](docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
