"""Runs the chat template and the text tokenizer of a foreign model within limits.

transformers renders templates in jinja's immutable sandbox, which protects Python objects but limits neither time nor
memory: one expression such as `{{ 'a' * 10**10 }}` fills the machine. Here they run in a process of their own.
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from studio.checks import first_line
from studio.errors import StudioError

Result = TypeVar("Result")

MAX_TEMPLATE_CHARACTERS = 1 << 16
MAX_SECONDS = 10
MAX_BYTES = 1 << 29
_SCRIPT = Path(__file__).with_name("template_process.py")


class _Renderer:
    """The process that renders, which is started at its first use and again where it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, values: dict[str, Any]) -> dict[str, str]:
        """The answer of the process; empty where it ended or had to be ended."""
        with self._lock:
            process = self._running()
            timer = threading.Timer(MAX_SECONDS, process.kill)
            timer.start()
            try:
                self._write({"template": template, "values": values})
                assert process.stdout is not None
                return json.loads(process.stdout.readline() or "{}")
            except (OSError, ValueError):
                return {}
            finally:
                timer.cancel()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )
        self._write({"path": sys.path, "bytes": MAX_BYTES})
        return self._process

    def _write(self, value: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(value)}\n")
        self._process.stdin.flush()


_renderer = _Renderer()
atexit.register(_renderer.close)


def render_template(processor: Any, messages: list[dict[str, Any]]) -> str:
    """The prompt of a conversation, as `processor.apply_chat_template(..., add_generation_prompt=True)` makes it.

    Args:
        processor: of a vision-language model, with a chat template.
        messages: dicts of a role and a content.

    Raises:
        StudioError: the template fails, or exceeds a limit.
    """
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    values |= {name: str(token) for name, token in processor.tokenizer.special_tokens_map.items()}
    answer = _renderer.render(_template_of(processor), values)
    if "text" in answer:
        return answer["text"]
    if not answer:
        _renderer.close()
        raise StudioError("The chat template of this model does not end: use another copy of the model.")
    reason = first_line(ValueError(answer["error"]))
    raise StudioError(f"The chat template of this model cannot render a question: {reason}.".replace("..", "."))


def _template_of(processor: Any) -> str:
    template = processor.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise StudioError("This model has several chat templates and no default one: use another copy of it.")
        template = template["default"]
    return template


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
