"""What somebody wants sampled: the words and settings of one call, checked."""

import dataclasses
import json
import secrets

from studio import decoding_named, decodings_for
from studio.errors import StudioError
from studio.ui.server.checks import check_number, check_options, check_text, is_whole
from studio.ui.server.limits import MOST_PICTURES, check_words, limits

LARGEST_SEED = 2**53 - 1 - MOST_PICTURES  # a browser counts no further
_SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """One call of a model. A setting that is `None` is the model's own.

    Args:
        decoding: a name of `studio.DECODINGS`.
        options: its options, as far as they are given.
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
    options: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        most = limits().images
        if not is_whole(self.count) or not 1 <= self.count <= most:
            raise StudioError(f"Choose between 1 and {most} images." if most > 1 else "Choose one image.")
        check_words("The prompt", self.prompt)
        if self.seed is not None and (not is_whole(self.seed) or not 0 <= self.seed <= LARGEST_SEED):
            raise StudioError(f"Choose a seed from 0 to {LARGEST_SEED}, or leave it empty to have one sampled.")
        object.__setattr__(self, "count", int(self.count))
        object.__setattr__(self, "seed", sample_seed() if self.seed is None else int(self.seed))
        for name in _SAMPLING:
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        choice = decoding_named(check_text("The decoding", self.decoding, 100))
        object.__setattr__(self, "options", check_options(choice, self.options))
        choice.settings(**self.options)

    @classmethod
    def from_fields(cls, model, prompt, count, seed, guidance, temperature, top_k, top_p, decoding="ar", options=None):
        """The wish that a form describes: numbers as text, empty for the model's own or the decoding's usual one."""
        numbers = {
            "seed": number_of("seed", seed, int),
            "guidance_scale": number_of("guidance", guidance, float),
            "temperature": number_of("temperature", temperature, float),
            "top_k": number_of("top-k", top_k, int),
            "top_p": number_of("top-p", top_p, float),
        }
        kinds = {option.name: option.kind for option in decoding_named(decoding).options}
        chosen = {name: number_of(name, text, kinds.get(name, str)) for name, text in (options or {}).items()}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return cls(model, prompt, count, **numbers, decoding=decoding, options=chosen)

    @property
    def title(self):
        """The decoding as a person reads it."""
        choice = decoding_named(self.decoding)
        return choice.label(choice.settings(**self.options))

    @property
    def plain(self):
        """The name of the plain decoding of the models that this one is for."""
        return decodings_for(decoding_named(self.decoding).pipeline, ())[0]

    @property
    def how(self):
        """The decoding as an image carries it."""
        settings = decoding_named(self.decoding).settings(**self.options)
        note = {"approximate": True} if getattr(settings, "approximate", False) else {}
        return {"name": self.decoding, **self.options, **note}

    @property
    def seeds(self):
        """The seed of each image: consecutive numbers."""
        return [self.seed + index for index in range(self.count)]

    @property
    def settings(self):
        """The sampling settings that differ from the model's own, as arguments of the pipeline."""
        chosen = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if is_whole(chosen.get("top_k")):
            chosen["top_k"] = int(chosen["top_k"])
        return chosen

    @property
    def manner(self):
        """A text that is equal for wishes that differ in their words, images and seeds only."""
        return json.dumps([self.model, self.how, self.settings], sort_keys=True, default=str)

    @property
    def record(self):
        """The call as an image carries it."""
        call = {"model": self.model, "prompt": self.prompt, "num_images": self.count}
        return {**call, **self.settings, "decoding": self.how}


def sample_seed():
    """A new random seed, short enough to read aloud."""
    return secrets.randbelow(2**31)


def number_of(name, text, kind):
    """The number of a field that may be empty (`None`). Errors: `StudioError` for anything else."""
    text = (text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        called = name.replace("_", " ").capitalize()
        raise StudioError(f"{called} must be {what}, not {text[:40]!r}; or leave it empty.") from error
