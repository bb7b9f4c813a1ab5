"""The models this process has loaded: each once a device, on first use, shared by every session."""

import json
import threading
from collections import defaultdict
from dataclasses import dataclass

from studio.checkpoints.bundled import BUNDLED, ROOT, folder_of_model, read_checksums
from studio.errors import StudioError
from studio.ui.render.length_control import scale_of
from studio.ui.server.limits import check_model, is_offered, source_of

_SETTINGS = {"guidance": "guidance_scale", "temperature": "temperature", "top-k": "top_k", "top-p": "top_p"}
_pipelines = {}
_readers = {}
_tokenizers = {}
_judges = {}
_elsewhere = defaultdict(dict)  # by kind and device, where that is not the one that `studio.load` takes by itself
_MOST_PIPELINES = 8
_lock = threading.Lock()


@dataclass(frozen=True)
class Device:
    """Where models run.

    Args:
        name: as `studio.load` takes it; `None` leaves it the choice.
        dtype: what pipelines that sample compute in there; `None` likewise.
    """

    name: str | None = None
    dtype: str | None = None

    def enter(self):
        """Let this thread work there: what is not told a device takes that one."""
        if (self.name or "").startswith("cuda"):
            import torch

            torch.cuda.set_device(torch.device(self.name).index or 0)

    def load(self, name, **settings):
        """`studio.load` a model onto it."""
        import studio

        where = {} if self.name is None else {"device": self.name}
        return studio.load(name, **where, **settings)


HERE = Device()


def get_pipeline(name, device=HERE):
    """Return the pipeline called `name` (whatever `studio.load` takes), loading it when it is asked for the first time.

    Visitors may name any, so only the eight asked last stay loaded.

    Raises:
        StudioError: it cannot be loaded, it is something that cannot sample, or it is not offered here.
    """
    check_model(name)
    with _lock:
        pipelines = _pipelines if device == HERE else _elsewhere["pipelines", device]
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


def get_reader(name, device=HERE):
    """Return the model called `name` (whatever `studio.load` takes) that answers questions about images.

    Visitors may name any, so only the one asked last stays loaded. A new one answers a blank image first: the time of
    its first real answer is then that of any other.

    Raises:
        StudioError: it cannot be loaded, it reads no images, or it is not offered here.
    """
    check_model(name)
    with _lock:
        readers = _readers if device == HERE else _elsewhere["readers", device]
        if name not in readers:
            readers.clear()
            loaded = device.load(source_of(name))
            if not hasattr(loaded, "processor"):
                raise StudioError(f"{name} reads no images: name a vision-language model of transformers.")
            loaded(_blank_image(), "what", max_new_tokens=2)
            readers[name] = loaded
        return readers[name]


def get_tokenizer(name, device=HERE):
    """Return the tokenizer called `name` (whatever `studio.load` takes), that of a pipeline which samples included.

    As of readers, only the one asked last stays loaded. It computes in float32, as the command line does: its tokens
    are then the same everywhere.

    Raises:
        StudioError: it cannot be loaded, it has no tokens of images, or it is not offered here.
    """
    check_model(name)
    with _lock:
        tokenizers = _tokenizers if device == HERE else _elsewhere["tokenizers", device]
        if name not in tokenizers:
            tokenizers.clear()
            loaded = device.load(source_of(name), dtype="float32")
            loaded = getattr(loaded, "image_tokenizer", loaded)
            if not hasattr(loaded, "encode"):
                raise StudioError(f"{name} makes no tokens of images: choose a tokenizer such as emoji-vq.")
            tokenizers[name] = loaded
        return tokenizers[name]


def get_judge(model):
    """The bundled judge, for what a pipeline samples.

    Raises:
        StudioError: it does not know what that pipeline samples, or is not in this copy.
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


def bundled_models(kind):
    """The names of the bundled models of a kind ("reader", "tokenizer", "pipeline") whose weights are here."""
    present = read_checksums()
    return [name for name, model in BUNDLED.items() if model.kind == kind and present.get(name)]


def _blank_image():
    from PIL import Image

    return Image.new("RGB", (64, 64), "white")


def own_settings(name):
    """What a pipeline uses where a field stays empty, read without loading it.

    Returns:
        A text by field ("guidance", "temperature", "top-k", "top-p"); none for what is not on this machine.
    """
    index = _read_index(name)
    own = {field: index.get(f"default_{setting}") for field, setting in _SETTINGS.items()}
    return {field: f"{value:g}" for field, value in own.items() if value is not None}


def fitting_decodings(name):
    """The names of the decodings that fit a pipeline, the usual one first, read without loading it.

    All there are, for what is not on this machine.
    """
    from studio import DECODINGS, decodings_for, default_decoding

    index = _read_index(name)
    components = [part for part, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    kind = index.get("_class_name", "")
    found = decodings_for(kind, components)
    return sorted(found, key=lambda each: each != default_decoding(kind)) or list(DECODINGS)


def runs_as(name):
    """The "device" and the "dtype" of a pipeline that is loaded, as images carry them; `{}` for any other."""
    loaded = [_pipelines, *(models for (kind, _), models in _elsewhere.items() if kind == "pipelines")]
    for pipe in (pipelines[name] for pipelines in loaded if name in pipelines):
        return {"device": str(pipe.device), "dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    return {}


def tokenizer_scale(name):
    """The `Scale` of a tokenizer that is loaded or on this machine, read without loading it; `None` for any other."""
    if loaded := _tokenizers.get(name):
        return scale_of(type(loaded).__name__, loaded.config)
    config = _read_json(name, "config.json") or _read_json(name, "image_tokenizer/config.json")
    return scale_of(config.get("_class_name"), config)


def _read_index(name):
    return _read_json(name, "model_index.json")


def _read_json(name, file):
    if not is_offered(name):
        return {}
    folder = ROOT / name if name in BUNDLED else folder_of_model(source_of(name))
    try:
        return json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
