"""A tokenizer whose codebooks are learned by averages while it trains, and stored with it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from studio.tokenizers.rvq import RVQTokenizer
from studio.training.export import save_bf16


def load_with_codebook(module: nn.Module, folder: Path) -> None:
    """Start a module with a `tokenizer`, and a `quantizer` (vector-quantize-pytorch's, plain or residual) that learns
    its codes, from the exported tokenizer in a folder.
    """
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    tokenizer: Any = module.tokenizer
    tokenizer.load_state_dict({key: value.float() for key, value in weights.items()})
    start_codebooks(module, tokenizer.codebooks if isinstance(tokenizer, RVQTokenizer) else [tokenizer.codebook])


@torch.no_grad()
def start_codebooks(module: nn.Module, tables: list[torch.Tensor]) -> None:
    """Start such a module with codes (V, dim), one table for each of its codebooks."""
    for codes, table in zip(_learned(module), tables, strict=True):
        codes.embed.copy_(table)
        codes.embed_avg.copy_(codes.embed)
        codes.cluster_size.fill_(1)  # as after a step that used each code once: none of them is dead
        codes.initted.fill_(True)


@torch.no_grad()
def put_codebook(module: nn.Module) -> None:
    """Gives the tokenizer of such a module the codes that its quantizer has learned."""
    for codes, table in zip(_learned(module), _tables(module.tokenizer), strict=True):
        table.weight.copy_(codes.embed[0])


def export_with_codebook(module: nn.Module, folder: Path) -> None:
    """Write the tokenizer of such a module with the codes that its quantizer has learned."""
    put_codebook(module)
    save_bf16(module.tokenizer, folder)


def _tables(tokenizer):
    return tokenizer.quantizer.codebooks if isinstance(tokenizer, RVQTokenizer) else [tokenizer.quantize.embedding]


def _learned(module):
    return [layer._codebook for layer in getattr(module.quantizer, "layers", [module.quantizer])]
