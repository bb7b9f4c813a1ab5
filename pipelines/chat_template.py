"""Runs the chat template and the text tokenizer of a foreign model within limits.

transformers renders templates in jinja's immutable sandbox, which protects Python objects but does not limit loops.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from studio.checks import first_line
from studio.errors import StudioError

Result = TypeVar("Result")
TraceFunction = Callable[[FrameType, str, Any], Any]

MAX_TEMPLATE_CHARACTERS = 1 << 16
MAX_TEMPLATE_LINES = 1_000_000


def bounded_render(render: Callable[[], str]) -> str:
    """Renders a chat template within a limit on the executed lines.

    Args:
        render: renders the template in the sandbox of transformers.

    Raises:
        StudioError: the template fails, or exceeds the limit.
    """
    left, before = MAX_TEMPLATE_LINES, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> TraceFunction:
        nonlocal left
        left -= 1
        if left < 0:
            raise StudioError("The chat template of this model does not end: use another copy of the model.")
        return trace

    sys.settrace(trace)
    try:
        return render()
    except StudioError:
        raise
    except Exception as error:  # a template may call anything that the sandbox has
        raise StudioError(f"The chat template of this model cannot render a question: {first_line(error)}") from error
    finally:
        sys.settrace(before)


def check_template(template: str | dict | None) -> None:
    """Raises a `StudioError` for chat templates that are too long."""
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        if not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARACTERS:
            raise StudioError(f"A chat template has at most {MAX_TEMPLATE_CHARACTERS} characters: use another model.")


def checked_tokenize(tokenize: Callable[[], Result]) -> Result:
    """The result of a call of a text tokenizer.

    Its regular expression engine limits its steps and panics beyond the limit, which reaches Python as a
    `BaseException` that is not an `Exception`.

    Raises:
        StudioError: the tokenizer panics.
    """
    try:
        return tokenize()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise StudioError("The text tokenizer of this model cannot read this text: shorten or reword it.") from error
