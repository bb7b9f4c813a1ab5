"""What documents show: their blocks of code, their command lines, the files that they lead to."""

import re
import shlex
from pathlib import Path

import typer

from studio import cli

ROOT = Path(__file__).parent.parent


def blocks(text, language):
    """The blocks of a language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """Every `studio ...` line of its shell blocks, also behind a launcher, without comments."""
    joined = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    lines = (line.partition(" #")[0].strip() for line in joined.splitlines())
    return sorted({match[1] for line in lines if (match := re.search(r"(?:^|&& |-m )(studio .*)", line))})


def parse(line):
    """What the command line makes of a line, without running it: the options of its command by name."""
    command, arguments = typer.main.get_command(cli.app), shlex.split(line)[1:]
    context = command.make_context("studio", list(arguments), resilient_parsing=True)
    while getattr(command, "commands", None):
        name, arguments = arguments[0], arguments[1:]
        assert name in command.commands, line
        command = command.commands[name]
    return command.make_context(name, list(arguments), parent=context).params


def dead_links(file):
    """Relative links of a document, images too, that lead to no file."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8"))
    return [link for link in links if not (file.parent / link).exists()]
