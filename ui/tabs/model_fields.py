"""Fields of the tabs that sample: the model, the class of a class-conditional one, and what follows from a model."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from studio.checkpoints.bundled import BUNDLED
from studio.ui.server.limits import limits
from studio.ui.server.models import about_model, class_names, known_concepts, offered_pipelines, own_settings
from studio.ui.tabs.components import short_name

EXAMPLES = [
    "a red apple",
    "a rocket, flat style, on a blue background",
    "an octopus, 3d style, on a pink background",
    "a hot beverage, 3d style",
    "a rainbow, on a purple background",
    "a fox, flat style",
]
_OPEN_EXAMPLES = ["a red apple on a wooden table", "a lighthouse at dusk", "a fox in the snow", "a bowl of soup"]
_FAMILIAR = ["golden retriever", "tabby", "daisy", "castle", "balloon", "espresso"]
"""Classes of ImageNet that most people can picture."""
_EMOJI_HINT = "A thing; a style, 3d or flat; a background colour."


def model_field(model: str, default: str, elem_id: str) -> gr.Dropdown:
    """The list of models: bundled ones, pulled ones, and any folder or Hub id where no server limits them.

    Args:
        model: the app's own.
        default: what is chosen.
        elem_id: of the field.
    """
    is_open = limits().models is None
    return gr.Dropdown(
        [(short_name(name), name) for name in offered_pipelines(model)],
        value=default,
        label="Model",
        info=about_model(default),
        allow_custom_value=is_open,
        elem_id=elem_id,
    )


def class_field(model: str, elem_id: str) -> gr.Dropdown:
    """The searchable list of the classes of a model, hidden where it has none."""
    return gr.Dropdown(label="Class", info="Type to search, by name or number.", elem_id=elem_id, **_classes(model))


def subject_updates(model: str, prompt: gr.Textbox, class_label: gr.Dropdown, hint: str) -> dict[gr.Component, Any]:
    """Updates of the fields that say what to generate: a model reads one; `hint` says how to write a prompt."""
    return {
        prompt: gr.update(visible=class_names(model) is None, info=hint),
        class_label: gr.update(**_classes(model)),
    }


def prompt_hint(model: str) -> str:
    """How to write a prompt for a model."""
    return _EMOJI_HINT if model in BUNDLED else "What the image shows."


def examples_of(model: str) -> list[str]:
    """Prompts to try with a model, or names of its classes."""
    if classes := class_names(model):
        names = [label.split(",")[0] for label in classes.values()]
        return [name for name in _FAMILIAR if name in names] or _spread(names)
    if model in BUNDLED:
        return EXAMPLES
    return _spread(known_concepts(model)) or _OPEN_EXAMPLES


def own_setting(own: Mapping[str, str], name: str) -> str:
    """What an empty field stands for."""
    return own.get(name, "model's own")


def settings_updates(model: str, fields: dict[str, gr.Component]) -> dict[gr.Component, Any]:
    """Updates of the fields of sampling settings, by their names: empty ones show the model's own."""
    own = own_settings(model)
    return {field: gr.update(placeholder=own_setting(own, name)) for name, field in fields.items()}


def _classes(model: str) -> dict[str, Any]:
    classes = class_names(model) or {}
    choices = [
        (f"{label} · {number}" if label != f"class {number}" else label, number) for number, label in classes.items()
    ]
    return {"choices": choices, "value": None, "visible": bool(classes)}


def _spread(names: list[str], count: int = 6) -> list[str]:
    """Some of the names, from all over the list."""
    return names[:: max(1, len(names) // count)][:count]
