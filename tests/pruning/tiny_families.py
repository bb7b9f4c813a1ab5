"""A tiny random model of every family, and how tests ask it."""

import functools

import pytest
import torch

from tests.pruning.more_tiny_models import MORE_FAMILIES
from tests.pruning.tiny_models import InternVL, Llava15, LlavaNext, LlavaOnevision, Qwen3, Qwen25, SmolVLM

FAMILIES = {
    "llava": Llava15,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "qwen2_5_vl": Qwen25,
    "qwen3_vl": Qwen3,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
    **MORE_FAMILIES,
}

ROWS = ((0,), (1, 2))
three_axes = [name for name, made in FAMILIES.items() if issubclass(made, Qwen25)]
every_family = pytest.mark.parametrize("family", FAMILIES)


def rare(families):
    """The families, those that differ from others in nothing but names among the slow tests."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in MORE_FAMILIES else name for name in families]
    return pytest.mark.parametrize("family", marked)


reads_attention = pytest.mark.parametrize(
    "family",
    [
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "glm4v",
    ],
)


@functools.cache
def tiny(family, attention="sdpa"):
    return FAMILIES[family](attention)


def layers(model):
    """The decoder layers of a vision-language model."""
    base = model.base_model
    return (getattr(base, "language_model", None) or base.text_model).layers


def answer(model, inputs, tokens=4, **options):
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def dropped_mask(model, inputs, info):
    """The attention mask of the whole prompt with a 0 on every token that was pruned."""
    mask, image = inputs["attention_mask"].clone(), inputs["input_ids"] == model.config.image_token_id
    stays = [torch.isin(torch.arange(before), kept).long() for before, kept in zip(info.tokens_before, info.kept)]
    mask[image] = torch.cat(stays)
    return mask


def whole_positions(model, inputs):
    if "image_grid_thw" in inputs:
        return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    mask = inputs["attention_mask"]
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
