"""What becomes of errors: a sentence for the one who asked, and nothing of it for anybody else."""

import logging
from html import escape

import gradio as gr
from pydantic import ValidationError

from studio.errors import StudioError

UNEXPECTED = "Something in Studio failed with this request ({}): try again, or ask its host, whose log says more."
_LOG = logging.getLogger(__name__)


def sentence_of(error):
    """What a session is told of an exception: a mistake's own sentence; of a fault its kind, the log has the rest."""
    if isinstance(error, StudioError):
        return str(error).encode("utf-8", "backslashreplace").decode()
    _LOG.error("A request failed", exc_info=error)
    return UNEXPECTED.format(type(error).__name__)


def toast(message, title="Please check", duration=10):
    """Show a message on the page as text; Gradio would take it for HTML, and links bring words of anybody's."""
    gr.Warning(escape(message, quote=False), title=title, duration=duration)


class Page(gr.Blocks):
    """`gr.Blocks` of which every error is a sentence; Gradio itself answers `{"error": null}` to what is unexpected."""

    async def process_api(self, block_fn, inputs, *args, **settings):
        """As of `gr.Blocks`. Errors: `gr.Error` and no other."""
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

    async def preprocess_data(self, block_fn, inputs, *args, **settings):
        """As of `gr.Blocks`. Errors: `StudioError` where a value has not the form that its field has."""
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **settings)
        except ValidationError as error:
            raise StudioError("A file is given as what its upload answers: /gradio_api/info describes it.") from error


def _check_number_of(inputs, function):
    if len(inputs) != len(function.inputs):
        raise StudioError(
            f"This endpoint takes {len(function.inputs)} values, not {len(inputs)}: /gradio_api/info describes each."
        )
