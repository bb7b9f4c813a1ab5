"""Seconds, memory and cache of every pruning method on this machine, at several batch sizes and attention backends.

Runs a loaded model, or one of a published size with random weights: those say nothing, but take as long.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from studio.backends import wait
from studio.bench.models import check_fits
from studio.checkpoints.loading import load, pick_device
from studio.checks import check_choice, check_integer, shown
from studio.data.scenes import draw_scene
from studio.errors import StudioError
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pruning.api import prune, prune_inputs
from studio.pruning.kv_cache import compress
from studio.pruning.registry import IN_CACHE, METHODS, method_named

CACHE = "kv-"
METHODS_TIMED = ("divprune", "uniform", "fastv", "kv-coverage", "kv-snapkv")
ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
_IMAGE, _WORDS, _WARM = 100, 40, 1


@dataclass(frozen=True)
class Preset:
    """A published architecture: its configuration, and the image of one prompt.

    Args:
        name: of the class in transformers, without "ForConditionalGeneration".
        config: of its configuration.
        tokens: image tokens of a prompt.
        pixels: from a batch size, the inputs of the vision tower.
    """

    name: str
    config: dict[str, Any]
    tokens: int
    pixels: Callable[[int], dict[str, torch.Tensor]]


_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
}  # fmt: skip
_SMOLLM_135M = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192,
}  # fmt: skip
_SIGLIP_BASE = {
    "model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
_QWEN_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
}  # fmt: skip
_QWEN_TOWER = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def _llava_next_pixels(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(batch, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]] * batch)}


def _qwen_pixels(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(batch * 2304, 1176), "image_grid_thw": torch.tensor([[1, 48, 48]] * batch)}


PRESETS = {
    "smolvlm-256m": Preset(
        "SmolVLM",
        {"vision_config": _SIGLIP_BASE, "text_config": _SMOLLM_135M, "scale_factor": 4},
        17 * 64,
        lambda batch: {"pixel_values": torch.rand(batch, 17, 3, 512, 512)},
    ),
    "qwen2.5-vl-3b": Preset(
        "Qwen2_5_VL",
        {"vision_config": _QWEN_TOWER, "text_config": _QWEN_3B, "tie_word_embeddings": True},
        576,
        _qwen_pixels,
    ),
    "llava-1.5-7b": Preset(
        "Llava",
        {"vision_config": _CLIP, "text_config": _LLAMA_7B},
        576,
        lambda batch: {"pixel_values": torch.rand(batch, 3, 336, 336)},
    ),
    "llava-next-7b": Preset(
        "LlavaNext",
        {"vision_config": _CLIP, "text_config": _LLAMA_7B, "image_grid_pinpoints": [[672, 672]]},
        2928,
        _llava_next_pixels,
    ),
}


def bench_pruning_speed(
    model: str = "emoji-vlm",
    *,
    random: str | None = None,
    methods: tuple[str, ...] = METHODS_TIMED,
    keeps: tuple[float, ...] = (0.2,),
    after_layer: int | None = None,
    batches: tuple[int, ...] = (1,),
    attentions: tuple[str, ...] = ("sdpa",),
    new_tokens: int = 64,
    repeats: int = 10,
    device: str | None = None,
) -> dict:
    """Time every method beside the whole prompt, in turns.

    Args:
        model: what `studio.load` takes, a vision-language model.
        random: a name of `PRESETS` instead: random weights of that size, and a random image.
        methods: names of `studio.prune` before the language model, "fastv", "pyramiddrop", or "kv-" before a method of
            `studio.compress`.
        keeps: fractions of the image's tokens.
        after_layer: for methods of the language model.
        batches: prompts at once, all of the same length.
        attentions: "sdpa", "eager" or "flash".
        new_tokens: of each answer, from 2 up; nothing ends it early.
        repeats: runs of each setting, in turn with the others, after one that does not count; medians.

    Returns:
        `{"model", "device", "dtype", "rows", "left_out"}`. A row holds attention, batch, method, keep, image_tokens and
        kept_tokens of a prompt, seconds to `encode`, `select` and `prefill` the batch and `per_token` of decoding,
        their `total` for new_tokens, `speedup` of that over the whole prompt's, peak_bytes (on a GPU, else `None`),
        cache_bytes, and layer_bytes, those of each layer. left_out says why a method could not run.

    Raises:
        StudioError: an unknown name, a model that reads no images, weights that do not fit into memory, a backend that
            is not installed.
    """
    for name in attentions:
        check_choice("attention", name, tuple(ATTENTIONS))
    for name in methods:
        if name.startswith(CACHE):
            check_choice("The method of the cache", name, [CACHE + method for method in IN_CACHE])
        elif name not in ("fastv", "pyramiddrop"):
            method_named(name)
    for batch in batches:
        check_integer("The batch", batch, 1)
    check_integer("new_tokens", new_tokens, 2)
    where = pick_device(device)
    network, prompt = _random(random, where) if random else _loaded(model, device)
    network.generation_config.eos_token_id = None
    rows: list[dict] = []
    left_out: dict[str, str] = {}
    settings = [("none", 1.0), *((method, keep) for method in methods for keep in keeps)]
    for attention in attentions:
        _use(network, attention)
        for batch in batches:
            found, reasons = _measured(network, prompt(batch), settings, after_layer, new_tokens, repeats)
            rows += [{"attention": attention, "batch": batch, **row} for row in found]
            left_out |= {f"{method}, {attention}": reason for method, reason in reasons.items()}
    kind = str(network.dtype).removeprefix("torch.")
    return {"model": random or model, "device": network.device.type, "dtype": kind, "rows": rows, "left_out": left_out}


def _random(preset: str, device: torch.device) -> tuple[PreTrainedModel, Callable[[int], dict]]:
    """A model of random weights, and prompts for it by batch size."""
    if preset not in PRESETS:
        raise StudioError(f"There is no preset {shown(preset)}: choose one of {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = getattr(transformers, f"{chosen.name}Config")(image_token_id=_IMAGE, **chosen.config)
    kind = getattr(transformers, f"{chosen.name}ForConditionalGeneration")
    with torch.device("meta"):
        needed = dtype.itemsize * sum(weight.numel() for weight in kind(config).parameters())
    check_fits(preset, needed, device)
    with torch.device(device):
        network = kind._from_config(config, dtype=dtype).eval()

    def prompt(batch: int) -> dict:
        row = torch.tensor([1, 2, *[_IMAGE] * chosen.tokens, *range(3, 3 + _WORDS)])
        ids = row.repeat(batch, 1)
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in chosen.pixels(batch).items()}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        if "image_grid_thw" in pixels:
            inputs["mm_token_type_ids"] = (ids == _IMAGE).int()
        return {name: value.to(device) for name, value in inputs.items()}

    return network, prompt


def _loaded(model: str, device: str | None) -> tuple[PreTrainedModel, Callable[[int], dict]]:
    pipe = load(model, device=device)
    if not isinstance(pipe, VisualQuestionPipeline):
        raise StudioError(f"{model} reads no images: name a vision-language model of transformers.")
    scene = draw_scene(np.random.default_rng(0))

    def prompt(batch: int) -> dict:
        inputs = pipe._inputs(Image.fromarray(scene.image), scene.questions[0].text)
        return {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in inputs.items()}

    return pipe.model, prompt


def _use(model: PreTrainedModel, attention: str) -> None:
    try:
        model.set_attn_implementation(ATTENTIONS[attention])
    except (ImportError, ValueError) as error:
        raise StudioError(f"{attention} attention cannot be used here: {str(error).splitlines()[0]}") from error


class _Clock(StoppingCriteria):
    """Notes when each new token is there; stops nothing."""

    def __init__(self, device: torch.device):
        self.device, self.ticks = device, [_now(device)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if len(self.ticks) == 1:
            self.ticks.append(_now(self.device))
        return torch.zeros_like(input_ids[:, 0], dtype=torch.bool)  # type: ignore[return-value]  # untyped dtype


def _now(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()


def _measured(model, inputs, settings, after_layer, new_tokens, repeats) -> tuple[list[dict], dict[str, str]]:
    runs: dict[tuple[str, float], list[dict]] = {setting: [] for setting in settings}
    reasons: dict[str, str] = {}
    for number in tqdm(range(repeats + _WARM), desc="timing", unit="round"):
        for setting in settings:
            if setting[0] in reasons:
                continue
            try:
                method, keep = setting
                run = _run(model, inputs, method, keep, after_layer, new_tokens)
            except StudioError as error:
                reasons[setting[0]] = str(error)
                continue
            runs[setting] += [run] if number >= _WARM else []
    rows = [_row(setting, found) for setting, found in runs.items() if setting[0] not in reasons]
    for row in rows:
        row["speedup"] = rows[0]["total"] / row["total"]
    return rows, reasons


@torch.no_grad()
def _run(model, inputs, method: str, keep: float, after_layer, new_tokens: int) -> dict:
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = method in METHODS and after_layer is None
    pruned, info = prune_inputs(model, inputs, method if before else "uniform", keep if before else 1.0)
    if before or method == "none":
        block: Any = nullcontext()
    elif method.startswith(CACHE):
        block = compress(model, method.removeprefix(CACHE), keep)
    else:
        block = prune(model, method, keep, after_layer=after_layer)
    with block as record:
        clock = _Clock(device)
        out = model.generate(
            **pruned,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        end = _now(device)
    rows = len(inputs["input_ids"])
    kept = info if record is None else record.info
    return {
        **info.seconds,
        "prefill": clock.ticks[1] - clock.ticks[0],
        "per_token": (end - clock.ticks[1]) / (new_tokens - 1),
        "total": sum(info.seconds.values()) + end - clock.ticks[0],
        "image_tokens": sum(info.tokens_before) // rows,
        "kept_tokens": sum(kept.tokens_after) // rows,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "layer_bytes": [
            sum(part.untyped_storage().nbytes() for part in (layer.keys, layer.values))
            for layer in out.past_key_values.layers
        ],
    }


def _row(setting: tuple[str, float], runs: list[dict]) -> dict:
    medians = {
        name: statistics.median(run[name] for run in runs)
        for name in ("encode", "select", "prefill", "per_token", "total")
    }
    last = {name: runs[-1][name] for name in ("image_tokens", "kept_tokens", "peak_bytes", "layer_bytes")}
    return {"method": setting[0], "keep": setting[1], **medians, **last, "cache_bytes": sum(last["layer_bytes"])}
