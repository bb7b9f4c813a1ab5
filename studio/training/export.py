"""Writing trained modules as bf16 safetensors without disturbing them."""

import copy

import torch


def save_bf16(model, folder):
    """`save_pretrained` of a bfloat16 copy of a diffusers or transformers model."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
