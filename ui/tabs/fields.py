"""Fields that Gradio does not have: for numbers that may stay empty, and for options by name."""

import gradio as gr


def number_field(label, info, elem_id, placeholder, **settings):
    """A field for a number that may stay empty (Gradio's number field cannot: it turns an empty one into 0)."""
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


def options_field(label):
    """A field for options by name, for programs, to which Gradio's own says nothing that they could check.

    Not a class: Gradio writes a file beside every component that is derived from one of its own.
    """
    field = gr.JSON(label=label)
    field.api_info = lambda: {"type": "object", "description": "options by name"}
    return field
