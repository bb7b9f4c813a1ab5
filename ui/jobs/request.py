"""A request to sample images: the prompt and settings of one call, checked."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from studio import decoding_named, decodings_for
from studio.checks import (
    MAX_NUMBER,
    as_integer,
    check_integer,
    check_number,
    check_options,
    check_text,
    set_fields,
    shown,
)
from studio.errors import StudioError
from studio.ui.server.limits import MAX_IMAGES, check_user_text, limits
from studio.ui.server.models import class_names

MAX_SEED = 2**53 - 1 - MAX_IMAGES  # a browser counts no further
_SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """One call of a model. A setting that is `None` is the model's own.

    Args:
        model: what `studio.load` takes.
        prompt: the text.
        count: images, at least 1.
        seed: of the first image, the next use seed + 1 and so on; sampled when `None`.
        guidance_scale, temperature, top_k, top_p: as of the pipeline.
        decoding: a name of `studio.DECODINGS`.
        options: its options by name; missing ones have their default.
        partial_images: previews that are wanted of each image; `None`: as many as the app shows.
        size: of the images, as in "256x256"; `None`: the model's own.
        class_label: a class by number or name, for a class-conditional model; `None`: the prompt says it.

    Raises:
        StudioError: a value of another type or outside its range.
    """

    model: str
    prompt: str
    count: int = 4
    seed: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    decoding: str = "ar"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial_images: int | None = None
    size: str | None = None
    class_label: int | str | None = None

    def __post_init__(self) -> None:
        check_user_text("The prompt", self.prompt)
        seed = sample_seed() if self.seed is None else self.seed
        choice = decoding_named(check_text("The decoding", self.decoding, 100))
        set_fields(
            self,
            count=check_integer("The number of images", as_integer(self.count), 1, limits().images),
            seed=check_integer("The seed", as_integer(seed), 0, MAX_SEED),
            options=check_options(self.options, {option.name: option.kind for option in choice.options}),
        )
        if self.class_label in ("", None):
            set_fields(self, class_label=None)
        elif isinstance(self.class_label, str):
            check_user_text("The class", self.class_label)
        else:
            set_fields(self, class_label=check_integer("The class", as_integer(self.class_label)))
        if self.top_k is not None:
            set_fields(self, top_k=check_integer("top_k", as_integer(self.top_k), 0, int(MAX_NUMBER)))
        for name in ("guidance_scale", "temperature", "top_p"):
            if (value := getattr(self, name)) is not None:
                set_fields(self, **{name: check_number(name, as_integer(value), -MAX_NUMBER)})
        choice.settings(**self.options)

    @classmethod
    def from_fields(
        cls,
        model: str,
        prompt: str,
        count: int,
        seed: str = "",
        guidance: str = "",
        temperature: str = "",
        top_k: str = "",
        top_p: str = "",
        decoding: str = "ar",
        options: Mapping[str, str] | None = None,
        class_label: int | str | None = None,
    ) -> "GenerateRequest":
        """The request of a form, whose numbers are texts; an empty text takes the default.

        A page has fields for a prompt and for a class, and shows that which the model reads. The other is not taken.
        Without a field for a class (`None`), the prompt may name it.

        Raises:
            StudioError: a text is no number, or a value is outside its range.
        """
        numbers: dict[str, Any] = {
            "seed": number_of("seed", seed, int),
            "guidance_scale": number_of("guidance", guidance, float),
            "temperature": number_of("temperature", temperature, float),
            "top_k": number_of("top-k", top_k, int),
            "top_p": number_of("top-p", top_p, float),
        }
        kinds = {option.name: option.kind for option in decoding_named(decoding).options}
        chosen = {name: number_of(name, text, kinds.get(name, str)) for name, text in (options or {}).items()}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        has_classes = class_label is not None and class_names(model) is not None
        subject = {"prompt": "", "class_label": class_label} if has_classes else {"prompt": prompt}
        return cls(model, **subject, count=count, **numbers, decoding=decoding, options=chosen)

    def check_subject(self) -> None:
        """Check that it says what the images show, before it waits for a device.

        Raises:
            StudioError: it has neither a prompt nor a class.
        """
        if self.class_label is None and not self.prompt.strip() and class_names(self.model) is None:
            raise StudioError("The prompt is empty: describe the image in a few words.")

    @property
    def title(self) -> str:
        """The title of the decoding."""
        choice = decoding_named(self.decoding)
        return choice.label(choice.settings(**self.options))

    @property
    def plain(self) -> str:
        """The name of the plain decoding for the same pipelines."""
        return decodings_for(decoding_named(self.decoding).pipeline, ())[0]

    @property
    def how(self) -> dict[str, Any]:
        """The decoding, as the metadata of an image records it."""
        settings = decoding_named(self.decoding).settings(**self.options)
        note = {"approximate": True} if getattr(settings, "approximate", False) else {}
        return {"name": self.decoding, **self.options, **note}

    @property
    def subject(self) -> str:
        """What the images show, for people: the prompt, or the first name of the class."""
        if self.class_label is None:
            return self.prompt
        names = class_names(self.model) or {}
        label = names.get(self.class_label, f"class {self.class_label}") if isinstance(self.class_label, int) else None
        return (label or str(self.class_label)).split(",")[0]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image, consecutive integers."""
        assert self.seed is not None
        return [self.seed + index for index in range(self.count)]

    @property
    def settings(self) -> dict[str, float]:
        """The sampling settings that are given, as arguments of the pipeline."""
        return {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}

    @property
    def joins(self) -> bool:
        """Whether it may join a running batch."""
        return getattr(decoding_named(self.decoding).settings(**self.options), "joins", False)

    @property
    def drafts(self) -> bool:
        """Whether the decoding takes drafts from somewhere."""
        return hasattr(decoding_named(self.decoding).settings(**self.options), "drafts")

    @property
    def batch_key(self) -> str:
        """Equal for requests that differ only in prompt, number of images and seeds."""
        return json.dumps([self.model, self.how, self.settings], sort_keys=True, default=str)

    @property
    def record(self) -> dict[str, Any]:
        """The call, as the metadata of an image records it."""
        what = (
            {"prompt": self.prompt} if self.class_label is None else {"prompt": None, "class_label": self.class_label}
        )
        return {"model": self.model, **what, "num_images": self.count, **self.settings, "decoding": self.how}


def sample_seed() -> int:
    """A random seed of at most 31 bits."""
    return secrets.randbelow(2**31)


def number_of(name: str, text: str | None, kind: Callable[[str], Any]) -> Any:
    """The number of a field; `None` for an empty one.

    Args:
        name: of the field, for messages.
        text: its text.
        kind: `int`, `float` or `str`.

    Raises:
        StudioError: the text is no such number.
    """
    text = (text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        called = name.replace("_", " ").capitalize()
        raise StudioError(f"{called} must be {what}, not {shown(text)}; or leave it empty.") from error
