"""`studio.load`: load a pipeline or a tokenizer by bundled name, folder or Hub id.

Folders of diffusers' form hold our pipelines and tokenizers; those of transformers' form a vision-language model.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from studio.backends import native_library
from studio.checkpoints.bundled import (
    BUNDLED,
    bundled_folder,
    bundled_name_of,
    folder_of_model,
    owner_of_words,
    unknown_name,
)
from studio.checkpoints.foreign import check_folder, check_sizes, check_weights, read_json
from studio.checkpoints.published import PUBLISHED, pull
from studio.checkpoints.vocabulary import read_vocabulary
from studio.checks import first_line, shown
from studio.errors import StudioError
from studio.models.distilled import DistilledStudent
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen
from studio.models.mar import MAR
from studio.models.resgen import ResGen
from studio.models.rq_transformer import RQTransformer
from studio.models.token_bridge import TokenBridge
from studio.models.xar import XAR
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.pipelines.llamagen import incompatibility as incompatibility_of_tokens
from studio.pipelines.mar import MARPipeline
from studio.pipelines.mar import incompatibility as incompatibility_of_patches
from studio.pipelines.resgen import ResGenPipeline
from studio.pipelines.resgen import incompatibility as incompatibility_of_sums
from studio.pipelines.rq_transformer import RQTransformerPipeline
from studio.pipelines.rq_transformer import incompatibility as incompatibility_of_stacks
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.pipelines.token_bridge import incompatibility as incompatibility_of_levels
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pipelines.xar import XARPipeline
from studio.pipelines.xar import incompatibility as incompatibility_of_latents
from studio.pruning.quecc import FOLDER, Compressor
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.token_bridge import TokenBridgeTokenizer
from studio.tokenizers.vq import VQTokenizer

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_TOKENIZERS = {
    kind.__name__: kind for kind in (VQTokenizer, RVQTokenizer, OneDPieceTokenizer, TokenBridgeTokenizer, KLTokenizer)
}
_PARTS = ("DistilledStudent", "Drafter", "LlamaGen", "MAR", "RQTransformer", "ResGen", "TokenBridge", "XAR")
logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load(name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Any:
    """Load a pipeline or a tokenizer.

    Args:
        name: a bundled name (`"emoji-ar"`), a folder written by `save_pretrained` or `studio convert`, or the id of a
            Hub repository of that form (`"owner/name"`); also a vision-language model of transformers, and a published
            model by name (`"llamagen-b-256"`, see `studio.checkpoints.published`), which is downloaded and converted
            first.
        device: where it runs; CUDA when there is one, else the CPU.
        dtype: a `torch.dtype` or one of `"float32"`, `"bfloat16"`, `"float16"` (`"fp32"`, `"bf16"`, `"fp16"`);
            float32 on a CPU and bfloat16 on CUDA when `None`.

    Returns:
        A pipeline (`LlamaGenPipeline`, `MARPipeline`, ...), a tokenizer (`VQTokenizer`, `OneDPieceTokenizer`,
        `KLTokenizer`, ...) or a `VisualQuestionPipeline`. A pipeline that samples and knows only some words has them in
        `pipe.vocabulary`, `(words, concepts)`; any other has `None` there.

    Raises:
        StudioError: unknown name, unreachable Hub, damaged weights, a folder that is no checkpoint or one of another
            architecture, a device that is not there, or an unknown dtype.

    Example:
        >>> pipe = studio.load("emoji-ar")
        >>> pipe("a red apple").images[0].save("apple.png")
    """
    device = pick_device(device)
    dtype = _dtype(dtype, device)
    model = _load_folder(_folder(name), dtype)
    return model.to(device)


def _folder(name):
    try:
        name = os.fsdecode(name)
    except TypeError as error:
        raise StudioError(f"Name a model by a bundled name, a folder or a Hub id, not by {shown(name)}.") from error
    if name in BUNDLED:
        if BUNDLED[name].kind == "judge":
            raise StudioError(f"{name} samples nothing, it only measures: `studio evaluate` uses it.")
        return bundled_folder(name)
    path = folder_of_model(name)
    if os.path.isdir(path):
        bundled = bundled_name_of(path)
        return bundled_folder(bundled) if bundled else path
    if os.path.exists(path):
        raise StudioError(f"{name} is a file, not a model folder: convert published checkpoints with `studio convert`.")
    if name in PUBLISHED:
        return pull(name, on_plan=_announce)
    if _HUB_ID.fullmatch(name):
        return _fetch(name)
    raise StudioError(unknown_name(name))


def _announce(plan):
    size = f"{plan['bytes'] / 1e9:.2f} GB"
    logger.warning("Downloading %s (%s, licence: %s) to %s.", plan["name"], size, plan["licence"], plan["folder"])


def _fetch(hub_id):
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        offline = (
            " (HF_HUB_OFFLINE is set)"
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
            else ""
        )
        raise StudioError(
            f"{hub_id!r} is no folder here and could not be fetched from the Hugging Face Hub{offline}; "
            f"bundled are {', '.join(BUNDLED)}."
        ) from error


def _load_folder(folder, dtype):
    check_folder(folder)
    if (folder / "model_index.json").is_file():
        return _load_pipeline(folder, dtype)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if config.get("architectures"):
            return _load_visual_question(folder, dtype)
        if _class_of(config) == AutoencoderKL.__name__:
            return KLTokenizer.from_autoencoder(load_model(AutoencoderKL, folder, dtype)).eval()
        if (part := _class_of(config)) in _PARTS:
            raise StudioError(f"{folder} holds a {part}, a part of a pipeline: read it with {part}.from_pretrained.")
        return load_model(_TOKENIZERS.get(part, VQTokenizer), folder, dtype)
    raise StudioError(f"{folder} is not a checkpoint: it holds neither model_index.json nor config.json.")


def _load_pipeline(folder, dtype):
    index = _read_index(folder)
    kind = _PIPELINES.get(_class_of(index), _LLAMAGEN)
    _check_class(index, kind.pipeline, folder)
    components = {
        "image_tokenizer": _load_image_tokenizer(index, kind.tokenizers, folder, dtype),
        "transformer": load_model(kind.model, folder / "transformer", dtype),
        "text_encoder": None,
        "tokenizer": None,
    }
    if (index.get("text_encoder") or [None])[0] is not None:
        words = _folder_of_words(folder)
        encoder, tokenizer = (_transformers_class(index, part, folder) for part in ("text_encoder", "tokenizer"))
        components["text_encoder"] = _load_weights(encoder, words / "text_encoder", dtype)
        components["tokenizer"] = _load_text_tokenizer(tokenizer, words / "tokenizer")
    for name, model in kind.helpers.items():
        if (index.get(name) or [None])[0] is not None:
            components[name] = load_model(model, folder / name, dtype)
    if mismatch := kind.mismatch(components["image_tokenizer"], components["transformer"].config):
        raise StudioError(f"{folder} does not fit together: {mismatch}.")
    pipe = kind.pipeline.from_pretrained(folder, trust_remote_code=False, **components)
    pipe.vocabulary = read_vocabulary(_folder_of_words(folder))
    return pipe


def _read_index(folder):
    """The content of `model_index.json`: the class of the pipeline, and [library, class] of each component."""
    index = read_json(folder / "model_index.json")
    for name in ("image_tokenizer", "transformer", "text_encoder", "tokenizer", "drafter", "student"):
        part = index.get(name) or [None, None]
        if not isinstance(part, list) or len(part) != 2 or not all(isinstance(each, str | None) for each in part):
            raise StudioError(f"{folder} is damaged: its model_index.json names no library and class of {name}.")
    return index


@dataclass(frozen=True)
class _Kind:
    """A pipeline's class, and those of its components.

    `tokenizers` are the classes that its image tokenizer may be of, the usual one first, each with the name of the
    bundled model of a pipeline that holds no weights of one. `mismatch` says in words what does not agree between an
    image tokenizer and the configuration of a transformer, or None.
    """

    pipeline: type
    model: type
    tokenizers: dict[type, str]
    helpers: dict
    mismatch: Callable


_LLAMAGEN = _Kind(
    LlamaGenPipeline,
    LlamaGen,
    {VQTokenizer: "emoji-vq", OneDPieceTokenizer: "emoji-1d"},
    {"drafter": Drafter, "student": DistilledStudent},
    incompatibility_of_tokens,
)
_MAR = _Kind(MARPipeline, MAR, {KLTokenizer: "emoji-kl"}, {"drafter": MAR}, incompatibility_of_patches)
_TOKEN_BRIDGE = _Kind(
    TokenBridgePipeline, TokenBridge, {TokenBridgeTokenizer: "emoji-kl"}, {}, incompatibility_of_levels
)
_RESGEN = _Kind(ResGenPipeline, ResGen, {RVQTokenizer: "emoji-rvq"}, {}, incompatibility_of_sums)
_RQ = _Kind(RQTransformerPipeline, RQTransformer, {RVQTokenizer: "emoji-rvq"}, {}, incompatibility_of_stacks)
_XAR = _Kind(XARPipeline, XAR, {KLTokenizer: "emoji-kl"}, {}, incompatibility_of_latents)
_PIPELINES = {kind.pipeline.__name__: kind for kind in (_LLAMAGEN, _MAR, _TOKEN_BRIDGE, _RESGEN, _RQ, _XAR)}


def _load_visual_question(folder, dtype):
    config = read_json(folder / "config.json")
    if str(config.get("model_type")) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise StudioError(f"{folder} holds {_class_of(config)}, which reads no images.")
    model = _load_weights(transformers.AutoModelForImageTextToText, folder, dtype)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise StudioError(f"The processor in {folder} cannot be read: {first_line(error)}") from error
    compressor = load_model(Compressor, folder / FOLDER, dtype) if (folder / FOLDER).is_dir() else None
    if compressor is not None:
        compressor.check_fits(model)
    return VisualQuestionPipeline(model, processor, compressor)


def _load_image_tokenizer(index, tokenizers, folder, dtype):
    """A pipeline without an `image_tokenizer` of its own uses the bundled one, which then need not be stored twice.

    Of a bundled TokenBridge pipeline that is the autoencoder alone: its levels are its own.
    """
    named = (index.get("image_tokenizer") or [None])[-1]
    kind = next((each for each in tokenizers if each.__name__ == named), next(iter(tokenizers)))
    own, bundled = folder / "image_tokenizer", tokenizers[kind]
    if not own.is_dir():
        return load_model(kind, bundled_folder(bundled), dtype)
    if kind is TokenBridgeTokenizer and bundled_name_of(folder) and not (own / SAFETENSORS_WEIGHTS_NAME).is_file():
        levels = kind.load_config(own)
        autoencoder = load_model(KLTokenizer, bundled_folder(bundled), dtype)
        return kind.from_autoencoder(autoencoder, **{name: levels[name] for name in kind.OF_LEVELS})
    return load_model(kind, own, dtype)


def _folder_of_words(folder):
    """The folder of a pipeline's text encoder, tokenizer and vocabulary; a bundled one is checked."""
    words = owner_of_words(folder)
    return words if words == folder else bundled_folder(words.name)


def load_model(model_class: type, folder: Path, dtype: torch.dtype) -> Any:
    """Load a model of Studio or diffusers from its folder, in the channels-last memory format.

    Raises:
        StudioError: another class or other weights.
    """
    config = read_json(folder / "config.json")
    _check_class(config, model_class, folder)
    check_sizes(config, folder)
    return _load_weights(model_class, folder, dtype).to(memory_format=torch.channels_last)


def _load_weights(model_class, folder, dtype):
    """Load a model from safetensors alone: pickled weights and remote code are never used."""
    options = {} if issubclass(model_class, ModelMixin) else {"trust_remote_code": False}
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, use_safetensors=True, **options
        )
    except Exception as error:
        raise StudioError(
            f"The weights in {folder} cannot be read as {model_class.__name__}: {first_line(error)}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(problem) or ())):
            what = problem.removesuffix("_keys")
            raise StudioError(
                f"The weights in {folder} are not those of its config.json: {len(keys)} {what}, first {keys[0]}."
            )
    check_weights(model.state_dict(), folder)
    return model.eval()


def _transformers_class(index, part, folder):
    library, name = index.get(part) or (None, None)
    found = getattr(transformers, str(name), None) if library == "transformers" else None
    if found is None:
        raise StudioError(f"{folder} needs a {part} from transformers, but names {library}.{name}.")
    return found


def _load_text_tokenizer(tokenizer_class, folder):
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise StudioError(f"The text tokenizer in {folder} cannot be read: {first_line(error)}") from error


def _check_class(config, expected, folder):
    found = _class_of(config)
    if found != expected.__name__:
        what = f"of another architecture ({found})" if found else "of an unknown architecture"
        raise StudioError(f"{folder} holds a checkpoint {what}, not {expected.__name__}.")


def class_of(folder: Path) -> str | None:
    """The name of the class that a folder of diffusers' is of; None where its config.json says nothing."""
    try:
        return _class_of(read_json(folder / "config.json"))
    except StudioError:
        return None


def _class_of(config):
    """The name of the class that a configuration is of, or None."""
    named = config.get("_class_name") or config.get("architectures")
    found = named[0] if isinstance(named, list) and named else named
    return found if isinstance(found, str) else None


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; without one CUDA if there is one, otherwise the CPU.

    Raises:
        StudioError: the device is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise StudioError(
            f"The device {shown(str(device))} is not there: use cpu, cuda, cuda:N or mps, whichever this machine has."
        ) from error
    return device


def compiled_step() -> str:
    """Whether models on this CPU are decoded by compiled C: "ok", otherwise the reason why not."""
    return native_library.state()


def _dtype(dtype, device):
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise StudioError(f"The dtype {shown(str(dtype))} is unknown: use one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
