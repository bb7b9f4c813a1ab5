"""A tokenizer whose codebooks are learned by averages while it trains, and stored with it."""

import torch
from safetensors.torch import load_file

from studio.tokenizers.rvq import RVQTokenizer
from studio.training.export import save_bf16


def load_with_codebook(module, folder):
    """Start a module with a `tokenizer`, and a `quantizer` (vector-quantize-pytorch's, plain or residual) that learns
    its codes, from the exported tokenizer in a folder."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    tokenizer = module.tokenizer
    tokenizer.load_state_dict({key: value.float() for key, value in weights.items()})
    tables = tokenizer.codebooks if isinstance(tokenizer, RVQTokenizer) else [tokenizer.codebook]
    start_codebooks(module, tables)


@torch.no_grad()
def start_codebooks(module, tables):
    """Start such a module with codes (V, dim), one table for each of its codebooks."""
    for codes, table in zip(_learned(module), tables, strict=True):
        codes.embed.copy_(table)
        codes.embed_avg.copy_(codes.embed)
        codes.cluster_size.fill_(1)  # as after a step that used each code once: none of them is dead
        codes.initted.fill_(True)


def export_with_codebook(module, folder):
    """Write the tokenizer of such a module with the codes that its quantizer has learned."""
    tokenizer = module.tokenizer
    tables = tokenizer.quantizer.codebooks if isinstance(tokenizer, RVQTokenizer) else [tokenizer.quantize.embedding]
    with torch.no_grad():
        for codes, table in zip(_learned(module), tables, strict=True):
            table.weight.copy_(codes.embed[0])
    save_bf16(tokenizer, folder)


def _learned(module):
    return [layer._codebook for layer in getattr(module.quantizer, "layers", [module.quantizer])]
