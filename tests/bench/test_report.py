"""Blocks of documents hold what their commands print, and only that changes."""

import pytest

from studio.bench.report import printed_by, records_table, regenerate, run_command
from studio.errors import StudioError

PAGE = """# Title

<!-- printed by: studio bench verify --vocab 64 -->

old | table

<!-- end -->

Words between.

<!-- printed by: studio bench pruning -->

<!-- end -->
"""


@pytest.fixture
def pages(tmp_path):
    first, second = tmp_path / "one.md", tmp_path / "two.md"
    first.write_text(PAGE)
    second.write_text(PAGE.replace("Title", "Other"))
    return first, second


def test_each_command_runs_once_and_its_output_takes_the_place(pages):
    ran = []
    commands = regenerate([*pages], run=lambda command: ran.append(command) or f"of {command}")
    assert ran == commands == ["studio bench verify --vocab 64", "studio bench pruning"]
    for page, title in zip(pages, ("Title", "Other")):
        text = page.read_text()
        assert text.startswith(f"# {title}\n") and "old" not in text and "\n\nWords between.\n\n" in text
        assert "-->\n\nof studio bench pruning\n\n<!-- end -->" in text and printed_by(text) == commands
    before = pages[0].read_text()
    regenerate([pages[0]], run=lambda command: f"of {command}")
    assert pages[0].read_text() == before


def test_only_some(pages):
    assert regenerate([pages[0]], only="pruning", run=lambda command: "new") == ["studio bench pruning"]
    assert "old | table" in pages[0].read_text()


def test_refusals_change_nothing(pages, tmp_path):
    def fail(command):
        raise StudioError("failed")

    for call in ({"documents": [tmp_path / "none.md"]}, {"documents": [*pages], "only": "nonsense"}):
        with pytest.raises(StudioError, match="no document|No block"):
            regenerate(**call)
    with pytest.raises(StudioError, match="failed"):
        regenerate([*pages], run=fail)
    with pytest.raises(StudioError, match="bench nonsense"):
        run_command("studio bench nonsense")
    assert pages[0].read_text() == PAGE


def test_what_a_command_prints():
    assert run_command("studio --version").count(".") == 2


def test_a_table_of_records():
    text = records_table([{"name": "a", "seconds": 0.123456}, {"name": "b", "ok": True, "seconds": None}])
    assert text.splitlines() == ["| name | seconds | ok |", "|---|---|---|", "| a | 0.1235 | – |", "| b | – | yes |"]
