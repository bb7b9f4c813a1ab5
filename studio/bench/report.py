"""Tables in documents, each printed by the command that stands above it.

A block of a Markdown document begins with `<!-- printed by: studio ... -->` and ends with `<!-- end -->`; in between is
what that command prints, and nothing else.

Results as Markdown tables, for terminals and documents alike.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from studio.errors import StudioError


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of column names and rows of text."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def records_table(records: list[dict]) -> str:
    """A Markdown table of records with a column for every key; numbers have four significant digits."""
    head = list(dict.fromkeys(key for record in records for key in record))
    return markdown_table(head, [[_cell(record.get(key)) for key in head] for record in records])


def _cell(value):
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_BLOCK = re.compile(r"(<!-- printed by: (studio [^\n]+?) -->\n).*?(\n<!-- end -->)", re.S)


def printed_by(text: str) -> list[str]:
    """The commands of a document's blocks, in order."""
    return [command for _, command, _ in _BLOCK.findall(text)]


def reprint(text: str, outputs: dict[str, str]) -> str:
    """The document with new outputs in the blocks of these commands."""
    return _BLOCK.sub(
        lambda found: f"{found[1]}\n{outputs[found[2]]}\n{found[3]}" if found[2] in outputs else found[0], text
    )


def run_command(command: str) -> str:
    """The output of a `studio ...` line on stdout; progress goes to stderr.

    Raises:
        StudioError: where it fails.
    """
    arguments = shlex.split(command)[1:]
    done = subprocess.run([sys.executable, "-m", "studio", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise StudioError(f"`{command}` failed: see above, mend that, and start again.")
    return done.stdout.strip()


def regenerate(documents: list[Path], only: str = "", run: Callable[[str], str] = run_command) -> list[str]:
    """Run the commands of all blocks, each once, and write their outputs into the documents.

    Args:
        documents: Markdown files; each is written as soon as its last command is done.
        only: a part of the commands to run; others stay as they are.
        run: from a command to its output.

    Returns:
        The commands that ran.

    Raises:
        StudioError: a missing document, where no command is found, and where one fails.
    """
    texts = {}
    for document in documents:
        if not document.is_file():
            raise StudioError(f"There is no document {document}.")
        texts[document] = document.read_text(encoding="utf-8")
    wanted = {
        document: [command for command in printed_by(text) if only in command] for document, text in texts.items()
    }
    if not any(wanted.values()):
        raise StudioError(f"No block of {', '.join(map(str, documents))} is printed by a command like that.")
    outputs = {}
    for document, commands in wanted.items():
        for command in commands:
            if command not in outputs:
                outputs[command] = run(command)
        if commands:
            document.write_text(reprint(texts[document], outputs), encoding="utf-8")
    return list(outputs)
