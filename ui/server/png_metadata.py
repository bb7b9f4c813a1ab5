"""The settings of a sampling brought back: out of an image that was sampled here, or out of a link."""

import json
from dataclasses import dataclass, field
from urllib.parse import urlencode

import gradio as gr

from studio import DECODINGS
from studio.errors import StudioError
from studio.saving import METADATA_KEY
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server.checks import is_whole
from studio.ui.server.failures import toast
from studio.ui.server.models import runs_as

_SAMPLING = {"guidance": "guidance_scale", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
_BASIC = ("prompt", "count", "seed", *_SAMPLING)
_WHERE = {"device": "cpu", "dtype": "float32"}
_OTHERS = ("cfg_interval", "num_tokens", "class_label", *_WHERE)
"""What images carry beside fields of the page."""
_OPTIONS = (option.name for choice in DECODINGS.values() for option in choice.options)
KNOWN = {*_BASIC, *_OTHERS, *_OPTIONS, "model", "decoding"}
"""The parameters of a link; others belong to somebody else, such as `utm_source`."""
_LONGEST_NOTE = 40  # characters of a name or a value that is not ours
_UNREADABLE = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RecursionError, SyntaxError, TypeError, ValueError),
)
_NO_PICTURE = "This file carries no settings: give a PNG as Studio saved it."


@dataclass(frozen=True)
class Recalled:
    """What a form is to hold again.

    Args:
        basic: by name of a field, "prompt", "count", "seed", "guidance", "temperature", "top_k" and "top_p"; what is
            not there stays as it is.
        model: what drew, or `None`.
        decoding: its name, or `None`.
        options: its options.
        others: settings by name that no page has a field for.
    """

    basic: dict
    model: str | None = None
    decoding: str | None = None
    options: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)


def from_image(path):
    """The settings of the image in a file, one of several of its call by its own seed.

    Fields that the image does not tell of are empty, and mean the model's own settings as they did then.

    Raises:
        StudioError: the file is no PNG with settings.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[METADATA_KEY])
        call, seed = record["call"], record["seed"]
        decoding = dict(call.get("decoding") or {})
        seeds = seed if isinstance(seed, list) else [seed]
        basic = {"prompt": call["prompt"] or "", "count": len(seeds), "seed": str(seeds[0])}
        if not isinstance(basic["prompt"], str) or not all(map(is_whole, seeds)):
            raise ValueError("neither words nor numbers")
    except _UNREADABLE as error:
        raise StudioError(_NO_PICTURE) from error
    for name, argument in _SAMPLING.items():
        basic[name] = "" if call.get(argument) is None else str(call[argument])
    decoding.pop("approximate", None)
    own = {"model", "prompt", "num_images", "decoding", *_SAMPLING.values()}
    others = {name: value for name, value in call.items() if name not in own and value is not None}
    return Recalled(basic, call.get("model"), decoding.pop("name", None), decoding, others)


def from_link(parameters):
    """The settings that the parameters of a link name.

    Raises:
        StudioError: the number of images is none.
    """
    parameters = dict(parameters)
    basic = {name: parameters.pop(name) for name in _BASIC if name in parameters}
    if "count" in basic:
        if not basic["count"].isdecimal() or len(basic["count"]) > 9:
            raise StudioError(f"The link asks for {basic['count'][:40]!r} images: give a whole number.")
        basic["count"] = int(basic["count"])
    return Recalled(basic, parameters.pop("model", None), parameters.pop("decoding", None), parameters)


def link_to(wish):
    """A link, relative to the app's address, that brings the settings of a wish back."""
    given = {"prompt": wish.prompt, "count": wish.count, "seed": wish.seed}
    sampling = {name: wish.settings.get(argument) for name, argument in _SAMPLING.items()}
    how = {"decoding": wish.decoding, **wish.options}
    return "?" + urlencode({name: value for name, value in (given | sampling | how).items() if value is not None})


class Form:
    """The fields of a form that settings come back to.

    Args:
        model: what samples here.
        basic: prompt, count, seed, guidance, temperature, top-k and top-p.
        decoding: the choice of a decoding.
        options: the fields of options, by (decoding, option).
        fitting: the names of the decodings that can be chosen.
    """

    def __init__(self, model, basic, decoding, options, fitting):
        self.model, self.fitting, self.options = model, fitting, options
        self.fields = [*basic, decoding, *options.values()]

    def filled(self, recalled):
        """Updates of the fields. What does not fit this app is left out, with a note for the session.

        Raises:
            StudioError: for a value that is wrong here.
        """
        notes, decoding, options, others = [], recalled.decoding, recalled.options, dict(recalled.others)
        if recalled.model not in (None, str(self.model)):
            notes.append(f"{_cut(recalled.model)} drew this, here {self.model} samples: the image will be another.")
        if decoding is not None and decoding not in self.fitting:
            notes.append(f"There is no decoding {_cut(decoding)} here: the usual one is chosen.")
            decoding, options, others = self.fitting[0], {}, others | options
        named = decoding or self.fitting[0]
        decoding = named if options else decoding
        unknown = {name: value for name, value in options.items() if (named, name) not in self.options}
        here = _WHERE | runs_as(self.model)
        left = [f"{_cut(name)} {_cut(value)}" for name, value in (others | unknown).items() if here.get(name) != value]
        if left:
            notes.append(f"This page has no field for {', '.join(left)}: the image may be another.")
        texts = {name: str(value) for name, value in options.items() if name not in unknown}
        basic = {"prompt": "", "count": 1, "seed": ""} | dict.fromkeys(_SAMPLING, "") | recalled.basic
        GenerateRequest.from_fields(self.model, *basic.values(), named, texts)
        if notes:
            toast(" ".join(notes), title="Please note", duration=12)
        own = [recalled.basic.get(name, gr.skip()) for name in _BASIC]
        chosen = gr.skip() if decoding is None else decoding
        others = [
            self._option(field, texts.get(name, "")) if owner == decoding else gr.skip()
            for (owner, name), field in self.options.items()
        ]
        return [*own, chosen, *others]

    @staticmethod
    def _option(field, text):
        """An empty text means the usual value: that of the page for a choice, none for a number."""
        return text if text or not isinstance(field, gr.Radio) else field.value


def _cut(value):
    """A name or a value out of an image or a link, short enough for a note."""
    text = str(value)
    return text if len(text) <= _LONGEST_NOTE else f"{text[:_LONGEST_NOTE]}..."
