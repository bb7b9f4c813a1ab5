"""Running the chat template and the text tokenizer of a model that somebody else made, within bounds.

transformers renders in jinja's immutable sandbox, which keeps a template from Python's objects but not from loops.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from studio.checks import first_line
from studio.errors import StudioError

Result = TypeVar("Result")

MAX_TEMPLATE_CHARACTERS = 1 << 16
MAX_TEMPLATE_LINES = 1_000_000


def bounded_render(render: Callable[[], str]) -> str:
    """What a chat template makes, in the sandbox of transformers, within a number of steps.

    Raises:
        StudioError: it fails, or takes more steps than any conversation needs.
    """
    left, before = MAX_TEMPLATE_LINES, sys.gettrace()

    def trace(frame, event, argument):
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
        raise StudioError(f"The chat template of this model takes no question: {first_line(error)}") from error
    finally:
        sys.settrace(before)


def check_template(template: str | dict | None) -> None:
    """Raises a `StudioError` for chat templates that are too long."""
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        if not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARACTERS:
            raise StudioError(f"A chat template has at most {MAX_TEMPLATE_CHARACTERS} characters: use another model.")


def reading(tokenize: Callable[[], Result]) -> Result:
    """What a text tokenizer makes of a text. Raises: `StudioError` where its compiled part gives up.

    The engine of its regular expressions counts its steps; past the limit it panics, which Python sees as an exception
    that is no `Exception`.
    """
    try:
        return tokenize()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise StudioError("The text tokenizer of this model gives up on this text: shorten or reword it.") from error
