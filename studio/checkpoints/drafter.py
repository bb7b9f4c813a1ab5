"""Converter of LANTERN's published drafters (arXiv:2410.03355) to folders for `Drafter.from_pretrained`.

Sizes come from the shapes of the weights; an unknown or missing key is an error. The head stays with the target.
"""

from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.official import (
    ANY_PLACE,
    build,
    from_transformers_names,
    llama_sizes,
    read_weights,
    save_new,
    shape_of,
)
from studio.models.drafter import Drafter

_IGNORED = {"lm_head.weight", "freqs_cis"}


def drafter_from_state_dict(state: dict[str, torch.Tensor], **config: Any) -> Drafter:
    """A `Drafter` with the authors' weights. Sizes are inferred; `config` overrides them (`num_heads`, ...)."""
    state = from_transformers_names({name: weight for name, weight in state.items() if name not in _IGNORED})
    what = "drafter of LANTERN"
    vocab, dim = shape_of(state, "embed_tokens.weight", what)
    if "fc.bias" not in state and "fc.weight" in state:
        state["fc.bias"] = torch.zeros(dim)
    inferred = {"vocab_size": vocab, **llama_sizes(state, dim, what)}
    return build(Drafter, inferred | config, state, what)


def convert_drafter(path: str | Path, out: str | Path, *, grid_size: int = 16, prefix_length: int = 120) -> Path:
    """Write a published drafter as a folder.

    Args:
        path: the authors' file, .bin, .pt or .safetensors.
        out: the folder to make.
        grid_size: tokens per side of the target: 16 in stage 1, 32 in stage 2; the file does not say.
        prefix_length: prefix positions of the target: 120 for text, 1 for classes.

    Raises:
        StudioError: a file that is no checkpoint or one of another architecture.
    """
    return save_new(read_drafter(path, grid_size=grid_size, prefix_length=prefix_length), out)


def read_drafter(path: str | Path, **config: Any) -> Drafter:
    """The `Drafter` of a published file; `config` as in `drafter_from_state_dict`, errors as in `convert_drafter`."""
    return drafter_from_state_dict(read_weights(path, ANY_PLACE), **config)
