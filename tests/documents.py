"""What documents show: their blocks of code, commands, tables, and the files that they link to."""

import re
import shlex
from pathlib import Path

import typer

from studio import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
"""All documents but the model cards."""
CARD_FILES = sorted((ROOT / "studio" / "checkpoints" / "bundled").rglob("README.md"))
"""The cards of bundled models and of their parts."""


def blocks(text, language):
    """The blocks of a language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """Every `studio ...` line of its shell blocks, also behind a launcher, without comments."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    lines = (line.partition(" #")[0].strip() for line in joined.splitlines())
    return sorted({match[1] for line in lines if (match := re.search(r"(?:^|&& |-m )(studio .*)", line))})


def named_commands(text):
    """The command of every `studio ...` in backticks, without its options."""
    found = re.findall(r"`studio((?: [a-z][a-z-]*)+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return sorted({"studio" + words for words in found})


def training_commands(text):
    """Every whole `studio train ...` in backticks, as model cards have them, a line break as a space."""
    return sorted({" ".join(found.split()) for found in re.findall(r"`(studio train\s[^`]+)`", text)})


def help_parses(line):
    """Whether the first word of a command, and the second where the first is a group, are commands."""
    command, words = typer.main.get_command(cli.app), line.split()[1:]
    while getattr(command, "commands", None) and words:
        if words[0] not in command.commands:
            return False
        command = command.commands[words.pop(0)]
    return True


def parse(line):
    """What the command line makes of a line, without running it: the options of its command by name."""
    command, arguments = typer.main.get_command(cli.app), shlex.split(line)[1:]
    context = command.make_context("studio", list(arguments), resilient_parsing=True)
    while getattr(command, "commands", None):
        name, arguments = arguments[0], arguments[1:]
        assert name in command.commands, line
        command = command.commands[name]
    return command.make_context(name, list(arguments), parent=context).params


def tables(text):
    """The tables of a document: lists of rows, the head first, each a list of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    return [
        [
            [cell.strip() for cell in row.strip("|").split("|")]
            for row in table.splitlines()
            if not row.startswith("|--")
        ]
        for table in found
    ]


def is_number(cell):
    return re.fullmatch(r"[<≈~+-]?\d[\d,.]*(?:e-?\d+)?\s?(?:%|s|ms|dB|x|×|\([\d.]+\))?", cell) is not None


def is_benchmark(table):
    """Whether half of the cells behind the first column are numbers."""
    cells = [cell for row in table[1:] for cell in row[1:]]
    return bool(cells) and sum(map(is_number, cells)) * 2 >= len(cells)


def dead_links(file):
    """Relative links of a document, images too, that lead to no file or to no heading of one."""
    links = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", file.read_text(encoding="utf-8"))
    return [link for link in links if not _leads_somewhere(file, *link.partition("#")[::2])]


def _leads_somewhere(file, path, anchor):
    target = file.parent / path if path else file
    return target.exists() and (not anchor or anchor in _anchors(target.read_text(encoding="utf-8")))


def _anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
