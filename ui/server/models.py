"""The models that this process has loaded: once for each device, on first use, shared by all sessions."""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.checkpoints.bundled import BUNDLED, ROOT, folder_of_model, owner_of_words, read_checksums
from studio.checkpoints.class_names import class_names_of, read_class_names
from studio.checkpoints.published import PUBLISHED, is_pulled, pulled_folder
from studio.checks import shown
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
_MOST_MEMORY = 0.5  # of a device's memory that the pipelines on it may fill
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

    Sessions may name any, so only those used last stay loaded: eight at most, that fill half of the device's memory at
    most. One that is dropped lives on until the work with it is done.

    Raises:
        StudioError: it cannot be loaded, it cannot sample, it is too large, or it is not offered here.
    """
    check_model(name)
    with _lock:
        pipelines = _pipelines if device == DEFAULT_DEVICE else _elsewhere["pipelines", device]
        if name not in pipelines:
            _make_room(pipelines, name, device)
            loaded = device.load(source_of(name), **({} if device.dtype is None else {"dtype": device.dtype}))
            if not hasattr(loaded, "image_tokenizer"):
                raise StudioError(f"{name} turns images into tokens and cannot sample: choose one such as emoji-ar.")
            loaded.set_progress_bar_config(disable=True)
            pipelines[name] = loaded
            _drop_oldest(pipelines, _memory(device))
        pipelines[name] = pipelines.pop(name)
        return pipelines[name]


def _make_room(pipelines: dict[str, Any], name: str, device: Device) -> None:
    """Drop pipelines before one is loaded, whose files are at most as large as what it takes.

    Raises:
        StudioError: it is larger than all that may be loaded.
    """
    folder, most = folder_of(name), _memory(device)
    size = sum(file.stat().st_size for deep in ("", "*/") for file in folder.glob(f"{deep}*.safetensors"))
    if size > most:
        raise StudioError(
            f"{name} does not fit: its weights are {size / 1e9:.1f} GB, and this app keeps at most {most / 1e9:.1f} GB "
            "of models there. Choose a smaller one."
        )
    _drop_oldest(pipelines, most - size, _MOST_PIPELINES - 1, keep=0)


def _drop_oldest(pipelines: dict[str, Any], most: float, count: int = _MOST_PIPELINES, keep: int = 1) -> None:
    """Drop the pipelines that were not used for longest, until `count` of them fill at most so many bytes."""
    while len(pipelines) > keep and (len(pipelines) > count or sum(map(_size_of, pipelines.values())) > most):
        del pipelines[next(iter(pipelines))]


def _size_of(pipe: Any) -> int:
    """Bytes of the weights of a pipeline."""
    parts = [part for part in getattr(pipe, "components", {}).values() if hasattr(part, "parameters")]
    return sum(weight.nbytes for part in parts for weight in part.parameters())


def _memory(device: Device) -> float:
    """Bytes that the pipelines of a device may fill.

    Raises:
        StudioError: the device is not there.
    """
    import torch

    from studio.checkpoints.loading import pick_device

    kind = pick_device(device.name)
    if kind.type == "cuda":
        return _MOST_MEMORY * torch.cuda.get_device_properties(kind).total_memory
    return _MOST_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    names = [*bundled_models("pipeline"), *pulled_pipelines()]
    return list(dict.fromkeys([model, *filter(is_offered, names)]))


def pulled_pipelines() -> list[str]:
    """The names of the published pipelines in the cache."""
    return [name for name in PUBLISHED if is_pulled(name) and (pulled_folder(name) / "model_index.json").is_file()]


def folder_of(name: str) -> Path:
    """The folder of a model on this machine, which need not be there, as `studio.load` finds it."""
    if name in BUNDLED:
        return ROOT / name
    source = source_of(name)
    folder = folder_of_model(source)
    return pulled_folder(source) if source in PUBLISHED and not folder.is_dir() else folder


def check_choice_of_model(name: Any) -> str:
    """The name of a model that a page may choose: one that is offered, and a pipeline unless it has to be fetched.

    Raises:
        StudioError: it is not offered, there is none, or it cannot sample.
    """
    from studio.checkpoints.bundled import unknown_name

    name = check_model(name).strip()
    if not name:
        raise StudioError("Choose a model first: a name of the list, a folder or a Hugging Face id.")
    if not folder_of(name).is_dir():
        is_away = name in PUBLISHED or (name.count("/") == 1 and not name.startswith((".", "/", "~")))
        if _loaded(name) is None and not is_away:
            raise StudioError(unknown_name(name))
    elif not _read_index(name):
        raise StudioError(f"{shown(name)} is no pipeline and cannot sample: choose one such as emoji-ar.")
    return name


def about_model(name: str) -> str:
    """What a model is, in a line."""
    if name in BUNDLED:
        return f"{BUNDLED[name].summary[:1].upper()}{BUNDLED[name].summary[1:]}."
    if name in PUBLISHED:
        about = PUBLISHED[name]
        return f"{about.summary}. Licence: {about.licence}."
    kind = str(_read_index(name).get("_class_name", "")).removesuffix("Pipeline")
    classes = class_names(name)
    if not kind:
        return "It is loaded by the first image."
    return f"A {kind} of {len(classes)} classes." if classes else f"A {kind} that reads prompts."


def class_names(name: str) -> dict[int, str] | None:
    """The names of the classes of a pipeline by number, read without loading it.

    `None` for a text-conditional one, and for one that is neither loaded nor on this machine.
    """
    if (pipe := _loaded(name)) is not None:
        return class_names_of(pipe)
    return read_class_names(folder_of(name)) if is_offered(name) else None


def known_concepts(name: str) -> list[str]:
    """The names of all that a pipeline can show, read without loading it; empty where that may be anything."""
    concepts = _read_json(name, "concepts.json", owner_of_words).get("concepts")
    return [concept for concept in concepts if isinstance(concept, str)] if isinstance(concepts, list) else []


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
    if (pipe := _loaded(name)) is None:
        return {}
    return {"device": str(pipe.device), "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}


def _loaded(name: str) -> Any:
    """A pipeline of this name that some device has loaded, or `None`."""
    loaded = [_pipelines, *(models for (kind, _), models in list(_elsewhere.items()) if kind == "pipelines")]
    return next((pipe for pipelines in loaded if (pipe := pipelines.get(name)) is not None), None)


def tokenizer_length_control(name: str) -> LengthControl | None:
    """The control of a tokenizer that is loaded or on this machine, read without loading it; `None` for any other."""
    if loaded := _tokenizers.get(name):
        return length_control(type(loaded).__name__, loaded.config)
    config = _read_json(name, "config.json") or _read_json(name, "image_tokenizer/config.json")
    return length_control(config.get("_class_name"), config)


def _read_index(name: str) -> dict[str, Any]:
    return _read_json(name, "model_index.json")


def _read_json(name: str, file: str, owner: Callable[[Path], Path] = Path) -> dict[str, Any]:
    """A file in what `owner` makes of a model's folder; empty where there is none that can be read."""
    if not is_offered(name):
        return {}
    try:
        found = json.loads((owner(folder_of(name)) / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
