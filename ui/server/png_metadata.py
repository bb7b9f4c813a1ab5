"""The settings of a call, read back from the metadata of its PNG or from a link."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from studio import DECODINGS
from studio.checkpoints.class_names import class_number
from studio.checks import as_integer, check_integer, shown
from studio.errors import StudioError
from studio.saving import METADATA_KEY
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server.failures import toast
from studio.ui.server.limits import is_offered
from studio.ui.server.models import (
    check_choice_of_model,
    class_names,
    fitting_decodings,
    offered_pipelines,
    runs_as,
)

Updates = dict[gr.Component, Any]
_SAMPLING = {"guidance": "guidance_scale", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
_BASIC = ("prompt", "count", "seed", *_SAMPLING, "class_label")
_WHERE = {"device": "cpu", "dtype": "float32"}
_OTHERS = ("cfg_interval", "num_tokens", *_WHERE)
"""Settings that images carry and the page has no field for."""
_OPTIONS = (option.name for choice in DECODINGS.values() for option in choice.options)
KNOWN = {*_BASIC, *_OTHERS, *_OPTIONS, "model", "decoding"}
"""The parameters of a link; others, such as `utm_source`, are ignored."""
_LONGEST_NOTE = 40  # characters of a name or a value in a message
_UNREADABLE = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RecursionError, SyntaxError, TypeError, ValueError),
)
_NO_SETTINGS = "This file carries no settings: give a PNG as Studio saved it."


@dataclass(frozen=True)
class SavedSettings:
    """The settings for a form.

    Args:
        basic: by field: "prompt", "count", "seed", "guidance", "temperature", "top_k", "top_p" and "class_label"; a
            field that is missing here stays as it is.
        model: the name of the model that sampled, or `None`.
        decoding: the name of the decoding, or `None`.
        options: those of the decoding, by name.
        others: settings by name that the page has no field for.
    """

    basic: dict[str, Any]
    model: str | None = None
    decoding: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def from_image(path: "str | PathLike[str]") -> SavedSettings:
    """The settings that a PNG carries; of an image of several, with its own seed.

    Fields for settings that the PNG does not carry are empty: the call used the model's own.

    Raises:
        StudioError: the file is no PNG with settings.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[METADATA_KEY])
        call, seed = record["call"], record["seed"]
        decoding = dict(call.get("decoding") or {})
        seeds = [check_integer("A seed", as_integer(each)) for each in (seed if isinstance(seed, list) else [seed])]
        basic = {"prompt": call["prompt"] or "", "count": len(seeds), "seed": str(seeds[0])}
        if not isinstance(basic["prompt"], str):
            raise ValueError("the prompt is no text")
    except _UNREADABLE as error:
        raise StudioError(_NO_SETTINGS) from error
    for name, argument in _SAMPLING.items():
        basic[name] = "" if call.get(argument) is None else str(call[argument])
    decoding.pop("approximate", None)
    basic["class_label"] = call.get("class_label")
    own = {"model", "prompt", "class_label", "num_images", "decoding", *_SAMPLING.values()}
    others = {name: value for name, value in call.items() if name not in own and value is not None}
    return SavedSettings(basic, call.get("model"), decoding.pop("name", None), decoding, others)


def from_link(parameters: "Mapping[str, str] | Sequence[tuple[str, str]]") -> SavedSettings:
    """The settings that the parameters of a link name.

    Raises:
        StudioError: the number of images is no whole number.
    """
    parameters = dict(parameters)
    basic: dict[str, Any] = {name: parameters.pop(name) for name in _BASIC if name in parameters}
    if "count" in basic:
        if not basic["count"].isdecimal() or len(basic["count"]) > 9:
            raise StudioError(f"The link asks for {shown(basic['count'])} images: give a whole number.")
        basic["count"] = int(basic["count"])
    return SavedSettings(basic, parameters.pop("model", None), parameters.pop("decoding", None), parameters)


def link_to(request: GenerateRequest, default: str) -> str:
    """A link, relative to the app's address, to the settings of a request; `default` is the app's own model."""
    model = None if request.model == default else request.model
    what = {"prompt": request.prompt} if request.class_label is None else {"class_label": request.class_label}
    given = {"model": model, **what, "count": request.count, "seed": request.seed}
    sampling = {name: request.settings.get(argument) for name, argument in _SAMPLING.items()}
    how = {"decoding": request.decoding, **request.options}
    return "?" + urlencode({name: value for name, value in (given | sampling | how).items() if value is not None})


class Form:
    """The fields that saved settings fill.

    Args:
        default: the name of the app's own model.
        models: the field of the model.
        basic: the fields of prompt, count, seed, guidance, temperature, top-k, top-p and class.
        decoding: the field of the decoding.
        options: the fields of options, by (decoding, option).
        follow: the updates of components that follow from a model.
    """

    def __init__(
        self,
        default: str,
        models: gr.Dropdown,
        basic: Sequence[gr.Component],
        decoding: gr.Radio,
        options: Mapping[tuple[str, str], gr.Component],
        follow: Callable[[str], Updates],
    ) -> None:
        self.default, self.models, self.decoding, self.options, self.follow = default, models, decoding, options, follow
        self.basic = dict(zip(_BASIC, basic, strict=True))
        self.fields = [models, *basic, decoding, *options.values()]
        self.outputs = list(dict.fromkeys([*self.fields, *follow(default)]))

    def choose(self, model: Any, decoding: Any) -> Updates:
        """Updates after a user has chosen a model; the decoding stays if it fits.

        Raises:
            StudioError: no such model here.
        """
        model = check_choice_of_model(model)
        fitting = fitting_decodings(model)
        return merged(self.follow(model), {self.decoding: decoding if decoding in fitting else fitting[0]})

    def filled(self, recalled: SavedSettings, chosen: str | None = None) -> Updates:
        """Updates of the fields, and of what follows from the model.

        What does not fit this app is left out, with a note.

        Args:
            recalled: the settings.
            chosen: the name of the model that is chosen; the app's own where it is `None`.

        Raises:
            StudioError: a value is wrong here.
        """
        chosen = chosen if isinstance(chosen, str) and is_offered(chosen) else self.default
        notes, decoding, options, others = [], recalled.decoding, recalled.options, dict(recalled.others)
        model = chosen if recalled.model is None else recalled.model
        if model != chosen and model not in offered_pipelines(self.default):
            notes.append(f"{_cut(model)} sampled this, here {chosen} does: the image will differ.")
            model = chosen
        fitting = fitting_decodings(model)
        if decoding is not None and decoding not in fitting:
            notes.append(f"There is no decoding {_cut(decoding)} here: the default is chosen.")
            decoding, options, others = fitting[0], {}, others | options
        named = decoding or fitting[0]
        decoding = named if options or model != chosen else decoding
        unknown = {name: value for name, value in options.items() if (named, name) not in self.options}
        here = _WHERE | runs_as(model)
        basic: dict[str, Any] = {"prompt": "", "count": 1, "seed": ""} | dict.fromkeys(_SAMPLING, "") | recalled.basic
        given = basic.pop("class_label", None)
        label = _class_number(model, basic["prompt"] if given in (None, "") else given)
        others |= {"class_label": given} if label is None and given not in (None, "") else {}
        left = [f"{_cut(name)} {_cut(value)}" for name, value in (others | unknown).items() if here.get(name) != value]
        if left:
            notes.append(f"This page has no field for {', '.join(left)}: the image may differ.")
        texts = {name: str(value) for name, value in options.items() if name not in unknown}
        GenerateRequest.from_fields(model, **basic, decoding=named, options=texts, class_label=label)
        if notes:
            toast(" ".join(notes), title="Please note", duration=12)
        own = {self.basic[name]: value for name, value in recalled.basic.items() if name != "class_label"}
        own |= {} if label is None else {self.basic["class_label"]: label}
        own |= {} if decoding is None else {self.decoding: decoding}
        own |= {
            field: self._option(field, texts.get(name, ""))
            for (owner, name), field in self.options.items()
            if owner == decoding
        }
        return own if model == chosen else merged(self.follow(model), {self.models: model, **own})

    @staticmethod
    def _option(field: gr.Component, text: str) -> Any:
        """The value of an option's field for a text; empty means the default: the page's for a choice, else none."""
        return text if text or not isinstance(field, gr.Radio) else field.value


def _class_number(model: str, label: Any) -> int | None:
    """The number of a class of a model, by number or name; `None` where the model has no such class."""
    names = class_names(model)
    with suppress(StudioError):
        return class_number(label, names) if names and isinstance(label, int | str) else None
    return None


def merged(updates: Updates, values: Updates) -> Updates:
    """Updates of components, with values for some of them."""
    both = {part: {**updates[part], "value": values[part]} for part in updates.keys() & values.keys()}
    return {**values, **updates, **both}


def _cut(value: object) -> str:
    """A name or a value of an image or a link, short enough for a message."""
    text = str(value)
    return text if len(text) <= _LONGEST_NOTE else f"{text[:_LONGEST_NOTE]}..."
