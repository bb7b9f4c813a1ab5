"""A tokenizer whose codebook is learned by averages while it trains, and stored with it."""

import torch
from safetensors.torch import load_file

from studio.training.export import save_bf16


def load_with_codebook(module, folder):
    """Start a module with a `tokenizer`, and a `quantizer` (vector-quantize-pytorch's) that learns its codes, from the
    exported tokenizer in a folder."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    module.tokenizer.load_state_dict({key: value.float() for key, value in weights.items()})
    codes = module.quantizer._codebook
    codes.embed.copy_(module.tokenizer.codebook)
    codes.embed_avg.copy_(codes.embed)
    codes.cluster_size.fill_(1)  # as after a step that used each code once: none of them is dead


def export_with_codebook(module, folder):
    """Write the tokenizer of such a module with the codes that its quantizer has learned."""
    with torch.no_grad():
        module.tokenizer.quantize.embedding.weight.copy_(module.quantizer.codebook)
    save_bf16(module.tokenizer, folder)
