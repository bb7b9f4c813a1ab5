"""In what precision a run computes here, and whether it is compiled."""

import functools
import os
import shutil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from studio.training.recipe import Recipe

COMPILED_MINUTES = 30
"""The shortest run on a CPU that is compiled: compiling takes one to two minutes."""


@functools.cache
def has_native_bf16() -> bool:
    """Whether the hardware multiplies bfloat16 natively; emulated it is far slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_compiled(recipe: "Recipe", device: torch.device) -> bool:
    """Whether `torch.compile` makes the network of a run faster.

    On CUDA every recipe says so of itself. On a CPU that holds for transformers in bfloat16 in a run that is long
    enough, where there is a C++ compiler.
    """
    if device.type == "cuda":
        return recipe.compiles
    is_long = (recipe.options.minutes or 0) >= COMPILED_MINUTES
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return recipe.compiles_on_cpu and is_long and has_native_bf16() and compiler is not None
