"""Output of commands: results on stdout, everything else on stderr, one JSON document when asked for.

Of several processes that do the same work the first one speaks; each tells its own mistakes.

With `--json` the file descriptor of stdout itself points to stderr while the command runs, so that no library, not even
a compiled one, can put a word in front of the document.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger

from studio.checks import json_text
from studio.processes import process_index

_document = None


def emit(document: object) -> None:
    """Set the JSON document that stdout gets when the command ends (`document` is any JSON value, NaN becomes null)."""
    global _document
    _document = document


def emit_error(sentence: str) -> None:
    """Set the sentence as the document's `"error"`, beside the results so far of a command that failed."""
    emit({**(_document if isinstance(_document, dict) else {}), "error": sentence})


def say(text: str) -> None:
    """Print one line of a result: on stdout, or on stderr under `--json`."""
    if process_index() == 0:
        print(_on_terminal(text, sys.stdout), flush=True)


def _on_terminal(text, stream):
    """A text with every character escaped that the encoding of the stream lacks, so that printing never fails."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


def warn(text: str) -> None:
    """Print one line on stderr."""
    if process_index() == 0:
        print(f"Warning: {text}", file=sys.stderr, flush=True)


def complain(sentence: str) -> None:
    """Print the error of a command on stderr, as one line."""
    print(f"Error: {' '.join(str(sentence).split())}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keep the progress bars and notes of diffusers and transformers off the terminal; errors still show.

    What pipelines log as a warning is printed by the commands themselves.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    getLogger("studio.pipelines.mar").setLevel("ERROR")


@contextmanager
def only_json_on_stdout() -> Iterator[None]:
    """Send what is written to stdout to stderr, and the document of `emit` to stdout at the end."""
    global _document
    _document = None
    sys.stdout.flush()
    real, stream = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stream
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
        if process_index() == 0:
            os.write(1, (json_text(_finite(_document)) + "\n").encode())


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
