"""Fields that Gradio does not have: for numbers that may stay empty, and for options by name."""

from typing import Any

import gradio as gr


def number_field(label: str, info: str, elem_id: str, placeholder: str, **settings: Any) -> gr.Textbox:
    """A field for a number that may stay empty; `gr.Number` turns an empty one into 0."""
    return gr.Textbox(
        label=label,
        info=info,
        placeholder=placeholder,
        max_lines=1,
        elem_id=elem_id,
        min_width=120,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        **settings,
    )


def options_field(label: str) -> gr.JSON:
    """A field for options by name, with the schema that programs need and `gr.JSON` lacks.

    It is no subclass, because Gradio writes a file beside the module of each subclass of its components.
    """
    field = gr.JSON(label=label)
    schema = {"type": "object", "description": "options by name"}
    field.api_info = lambda: schema  # type: ignore[method-assign]  # see above
    return field
