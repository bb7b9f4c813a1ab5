"""Fields for numbers that may stay empty."""

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
