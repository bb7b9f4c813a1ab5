"""Output of commands: results on stdout, everything else on stderr, one JSON document when asked for.

Of several processes that do the same work the first one speaks; each tells its own mistakes.

With `--json` the file descriptor of stdout itself points to stderr while the command runs, so that no library, not even
a compiled one, can put a word in front of the document.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import getLogger

from studio.checks import json_text
from studio.errors import StudioError
from studio.processes import process_index

_document = None


class OutputError(StudioError):
    """Stdout cannot be written; the cause is the `OSError`, a `BrokenPipeError` where its reader has gone away."""


def open_streams() -> None:
    """Put the null device in place of standard streams that are closed, so that no other file gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


@contextmanager
def writing_stdout() -> Iterator[None]:
    """What is written to stdout within the block, and nothing else that can fail.

    Raises:
        OutputError: it cannot be written; stdout is the null device from then on.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"The output cannot be written ({error.strerror or error}).") from error


def emit(document: object) -> None:
    """Set the JSON document that stdout gets when the command ends (`document` is any JSON value, NaN becomes null)."""
    global _document
    _document = document


def emit_error(sentence: str) -> None:
    """Set the sentence as the document's `"error"`, beside the results so far of a command that failed."""
    emit({**(_document if isinstance(_document, dict) else {}), "error": sentence})


def say(text: str) -> None:
    """Print one line of a result: on stdout, or on stderr under `--json`."""
    if process_index() != 0:
        return
    line = _on_terminal(text, sys.stdout)
    if sys.stdout is sys.stderr:
        _tell(line)
        return
    with writing_stdout():
        print(line)


def _on_terminal(text, stream):
    """A text with every character escaped that the encoding of the stream lacks, so that printing never fails."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


def warn(text: str) -> None:
    """Print one line on stderr."""
    if process_index() == 0:
        _tell(f"Warning: {text}")


def complain(sentence: str) -> None:
    """Print the error of a command on stderr, as one line."""
    _tell(f"Error: {' '.join(str(sentence).split())}")


def _tell(line):
    """Print a line on stderr, if that can be written."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


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
    """Send what is written to stdout to stderr, and the document of `emit` to stdout at the end.

    Raises:
        OutputError: stdout cannot be written.
    """
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
            data = (json_text(_finite(_document)) + "\n").encode()
            with writing_stdout():
                while data:
                    data = data[os.write(1, data) :]  # which may take a part only


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
