"""Sampling in C (`native.c`) for CPUs: filter, softmax and exponential race of many rows of logits are one call.

Where another order of roundings could make another token win, a row is left to PyTorch, so tokens are the same.
"""

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch

from studio.backends.native_library import library, loaded_library

_LANES = 8


class _Race(ctypes.Structure):
    """The struct `Race` of native.c."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [(name, ctypes.c_int32) for name in ("rows", "vocab", "top_k", "threads")]
        + [("divisor", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("logits", "noise", "places", "winners")]
    )


def can_race(logits: torch.Tensor, noise: torch.Tensor) -> bool:
    """Whether rows of these logits and this noise can be raced in C: float32 on a CPU, a multiple of 8 tokens."""
    fits = logits.dtype == noise.dtype == torch.float32 and not logits.shape[-1] % _LANES
    return fits and logits.device.type == noise.device.type == "cpu" and library() is not None


def race_winners(
    logits: torch.Tensor, noise: torch.Tensor, places: torch.Tensor, divisor: float, top_k: int
) -> torch.Tensor:
    """The tokens (rows,) that win, or -1 where rounding decides.

    Args:
        logits: (rows, V) for which `can_race` is true.
        noise: Exp(1) noise (n, V).
        places: (rows,) int64, the row of the noise for each row of logits.
        divisor: what logits are divided by.
        top_k: how many of the likeliest tokens may win, with those that are as likely as the last one; 0: all.
    """
    logits, noise, places = logits.contiguous(), noise.contiguous(), places.contiguous()
    winners = torch.empty(len(logits), dtype=torch.long)
    race = _Race(
        *logits.shape, top_k, torch.get_num_threads(), divisor, logits.data_ptr(), noise.data_ptr(), places.data_ptr(),
        winners.data_ptr(),
    )  # fmt: skip
    loaded_library().studio_winners(ctypes.byref(race))
    return winners
