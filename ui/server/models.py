"""The models that this process has loaded: once for each device, on first use, shared by all sessions."""

import json
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studio.checkpoints.bundled import BUNDLED, ROOT, folder_of_model, read_checksums
from studio.errors import StudioError
from studio.ui.render.length_control import LengthControl, length_control
from studio.ui.server.limits import check_model, is_offered, source_of

if TYPE_CHECKING:
    from PIL.Image import Image

_SETTINGS = {"guidance": "guidance_scale", "temperature": "temperature", "top-k": "top_k", "top-p": "top_p"}
_pipelines: dict[str, Any] = {}
_readers: dict[str, Any] = {}
_tokenizers: dict[str, Any] = {}
_judges: dict[str, Any] = {}
_elsewhere: defaultdict[tuple[str, "Device"], dict[str, Any]] = defaultdict(
    dict
)  # by kind and device, if not the default
_MOST_PIPELINES = 8
_lock = threading.Lock()


@dataclass(frozen=True)
class Device:
    """Where models run.

    Args:
        name: as `studio.load` takes it; `None` lets that choose.
        dtype: of pipelines there; `None` likewise.
    """

    name: str | None = None
    dtype: str | None = None

    def enter(self) -> None:
        """Make it the default device of this thread."""
        if self.name is not None and self.name.startswith("cuda"):
            import torch

            torch.cuda.set_device(torch.device(self.name).index or 0)

    def load(self, name: str, **settings: Any) -> Any:
        """`studio.load` a model onto it."""
        import studio

        where: dict[str, Any] = {} if self.name is None else {"device": self.name}
        return studio.load(name, **where, **settings)


DEFAULT_DEVICE = Device()


def get_pipeline(name: str, device: Device = DEFAULT_DEVICE) -> Any:
    """The pipeline called `name` (whatever `studio.load` takes), loaded on first use.

    Sessions may name any, so only the eight used last stay loaded.

    Raises:
        StudioError: it cannot be loaded, it cannot sample, or it is not offered here.
    """
    check_model(name)
    with _lock:
        pipelines = _pipelines if device == DEFAULT_DEVICE else _elsewhere["pipelines", device]
        if name not in pipelines:
            loaded = device.load(source_of(name), **({} if device.dtype is None else {"dtype": device.dtype}))
            if not hasattr(loaded, "image_tokenizer"):
                raise StudioError(f"{name} turns images into tokens and cannot sample: choose one such as emoji-ar.")
            loaded.set_progress_bar_config(disable=True)
            if len(pipelines) >= _MOST_PIPELINES:
                del pipelines[next(iter(pipelines))]
            pipelines[name] = loaded
        pipelines[name] = pipelines.pop(name)
        return pipelines[name]


def get_reader(name: str, device: Device = DEFAULT_DEVICE) -> Any:
    """The vision-language model called `name` (whatever `studio.load` takes), loaded on first use.

    Sessions may name any, so only the one used last stays loaded. A new one first answers a question about a blank
    image, so that its first real answer takes no longer than any other.

    Raises:
        StudioError: it cannot be loaded, it reads no images, or it is not offered here.
    """
    check_model(name)
    with _lock:
        readers = _readers if device == DEFAULT_DEVICE else _elsewhere["readers", device]
        if name not in readers:
            readers.clear()
            loaded = device.load(source_of(name))
            if not hasattr(loaded, "processor"):
                raise StudioError(f"{name} reads no images: name a vision-language model of transformers.")
            loaded(_blank_image(), "what", max_new_tokens=2)
            readers[name] = loaded
        return readers[name]


def get_tokenizer(name: str, device: Device = DEFAULT_DEVICE) -> Any:
    """The tokenizer called `name` (whatever `studio.load` takes), or that of the pipeline of this name.

    Only the one used last stays loaded. It computes in float32, as on the command line, so that tokens are the same
    everywhere.

    Raises:
        StudioError: it cannot be loaded, it has no tokens of images, or it is not offered here.
    """
    check_model(name)
    with _lock:
        tokenizers = _tokenizers if device == DEFAULT_DEVICE else _elsewhere["tokenizers", device]
        if name not in tokenizers:
            tokenizers.clear()
            loaded = device.load(source_of(name), dtype="float32")
            loaded = getattr(loaded, "image_tokenizer", loaded)
            if not hasattr(loaded, "encode"):
                raise StudioError(f"{name} makes no tokens of images: choose a tokenizer such as emoji-vq.")
            tokenizers[name] = loaded
        return tokenizers[name]


def get_judge(model: str) -> Any:
    """The bundled judge, for images of a pipeline.

    Raises:
        StudioError: the model is not bundled, or the judge is missing in this copy.
    """
    from studio.evaluation.judge import load_judge

    if model not in BUNDLED:
        raise StudioError("The judge knows the emoji of bundled models only, and this model is none of them.")
    with _lock:
        if "judge" not in _judges:
            try:
                _judges["judge"] = load_judge()
            except StudioError as error:
                raise StudioError("The judge (emoji-judge) is missing in this copy of Studio, or damaged.") from error
        return _judges["judge"]


def bundled_models(kind: str) -> list[str]:
    """The names of the bundled models of a kind ("reader", "tokenizer", "pipeline") whose weights are here."""
    present = read_checksums()
    return [name for name, model in BUNDLED.items() if model.kind == kind and present.get(name)]


def offered_pipelines(model: str) -> list[str]:
    """The names of pipelines to choose from: the app's own, the bundled and the pulled ones that requests may use."""
    from studio.checkpoints.published import PUBLISHED, pulled_folder

    pulled = (name for name in PUBLISHED if (pulled_folder(name) / "model_index.json").is_file())
    names = [*bundled_models("pipeline"), *pulled]
    return list(dict.fromkeys([model, *filter(is_offered, names)]))


def _blank_image() -> "Image":
    from PIL import Image

    return Image.new("RGB", (64, 64), "white")


def own_settings(name: str) -> dict[str, str]:
    """The default sampling settings of a pipeline, read without loading it.

    Returns:
        A text by field ("guidance", "temperature", "top-k", "top-p"); empty for a model that is not on this machine.
    """
    index = _read_index(name)
    own = {field: index.get(f"default_{setting}") for field, setting in _SETTINGS.items()}
    return {field: f"{value:g}" for field, value in own.items() if value is not None}


def fitting_decodings(name: str) -> list[str]:
    """The names of the decodings that fit a pipeline, its default first, read without loading it.

    For a model that is not on this machine, all decodings.
    """
    from studio import DECODINGS, decodings_for, default_decoding

    index = _read_index(name)
    components = [part for part, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    kind = index.get("_class_name", "")
    found = decodings_for(kind, components)
    return sorted(found, key=lambda each: each != default_decoding(kind)) or list(DECODINGS)


def runs_as(name: str) -> dict[str, str]:
    """The "device" and the "dtype" of a loaded pipeline, as its images record them; `{}` if it is not loaded."""
    loaded = [_pipelines, *(models for (kind, _), models in _elsewhere.items() if kind == "pipelines")]
    for pipe in (pipelines[name] for pipelines in loaded if name in pipelines):
        return {"device": str(pipe.device), "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    return {}


def tokenizer_length_control(name: str) -> LengthControl | None:
    """The control of a tokenizer that is loaded or on this machine, read without loading it; `None` for any other."""
    if loaded := _tokenizers.get(name):
        return length_control(type(loaded).__name__, loaded.config)
    config = _read_json(name, "config.json") or _read_json(name, "image_tokenizer/config.json")
    return length_control(config.get("_class_name"), config)


def _read_index(name: str) -> dict[str, Any]:
    return _read_json(name, "model_index.json")


def _read_json(name: str, file: str) -> dict[str, Any]:
    if not is_offered(name):
        return {}
    folder = ROOT / name if name in BUNDLED else folder_of_model(source_of(name))
    try:
        return json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
