"""Errors as sentences for the client whose request failed; the log has the rest."""

import logging
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
from pydantic import ValidationError

from studio.errors import StudioError

UNEXPECTED = "Something in Studio failed with this request ({}): try again, or ask its host, whose log says more."
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LOG = logging.getLogger(__name__)


def sentence_of(error: Exception) -> str:
    """The message for the session: that of a `StudioError`; of any other error its type, and the log has the rest."""
    if isinstance(error, StudioError):
        return str(error).encode("utf-8", "backslashreplace").decode()
    _LOG.error("A request failed", exc_info=error)
    return UNEXPECTED.format(type(error).__name__)


def error_content(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The content of an answer with an error, in the form of OpenAI's API.

    Args:
        message: a sentence.
        status: of HTTP.
        param: the parameter that it is about.
        code: a word for programs.
    """
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def toast(message: str, title: str = "Please check", duration: float = 10) -> None:
    """Show a message on the page as text. Gradio takes messages for HTML, and text out of links may be anybody's."""
    gr.Warning(escape(message, quote=False), title=title, duration=duration)


class Page(gr.Blocks):
    """`gr.Blocks` of which every error is a sentence; Gradio itself answers `{"error": null}` to unexpected ones."""

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **settings: Any) -> dict[str, Any]:
        """As of `gr.Blocks`.

        Raises:
            gr.Error: for every error.
        """
        function = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        try:
            if settings.get("iterator") is None:
                _check_number_of(inputs, function)
            return await super().process_api(function, inputs, *args, **settings)
        except gr.Error:
            raise
        except Exception as error:
            sentence = sentence_of(error)
            shown = escape(sentence, quote=False) if function.api_visibility == "private" else sentence
            raise gr.Error(shown, print_exception=False) from error

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **settings: Any) -> Any:
        """As of `gr.Blocks`.

        Raises:
            StudioError: a value has not the form of its field.
        """
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **settings)
        except ValidationError as error:
            raise StudioError("A file is given as what its upload answers: /gradio_api/info describes it.") from error


def _check_number_of(inputs: Sequence[Any], function: Any) -> None:
    if len(inputs) != len(function.inputs):
        raise StudioError(
            f"This endpoint takes {len(function.inputs)} values, not {len(inputs)}: /gradio_api/info describes each."
        )
