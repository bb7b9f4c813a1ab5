"""Sampling in C (`native.c`) for CPUs: filter, softmax and exponential race of many rows of logits are one call.

Where another order of roundings could make another token win, a row is left to PyTorch, so tokens are the same. Guesses
that are tested by probability, where rounding decides as rarely as a float's last place, are another call.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from studio.backends.native_library import library, loaded_library

if TYPE_CHECKING:
    from studio.decoding.lantern import Relaxation

_LANES, _MOST_TOKENS = 8, 65536


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


class _Guesses(ctypes.Structure):
    """The struct `Guesses` of native.c."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [
            (name, ctypes.c_int32)
            for name in ("images", "places", "vocab", "top_k", "width", "borrowed", "keeps", "threads")
        ]
        + [(name, ctypes.c_float) for name in ("divisor", "tv_budget", "ratio_budget")]
        + [
            (name, ctypes.c_void_p)
            for name in (
                "logits", "scales", "distributions", "proposals", "guesses", "near", "numbers", "found",
            )
        ]
    )  # fmt: skip


def can_test_guesses(logits: torch.Tensor) -> bool:
    """Whether guesses are tested in C for these logits: float32 on a CPU, a multiple of 8 tokens, 65,536 at most."""
    vocab = logits.shape[-1]
    fits = logits.dtype == torch.float32 and logits.device.type == "cpu" and not vocab % _LANES
    return fits and vocab <= _MOST_TOKENS and library() is not None


def guess_outcomes(
    logits: torch.Tensor,
    scales: torch.Tensor | None,
    guesses: torch.Tensor,
    proposals: torch.Tensor,
    numbers: torch.Tensor,
    divisor: float,
    top_k: int,
    keeps: bool,
    relaxation: "Relaxation | None" = None,
) -> torch.Tensor:
    """`decide` of `studio.decoding.couplings` for the distributions of logits, then `next_proposals`.

    Args:
        logits: (B, n, V) for which `can_test_guesses` is true; with scales (2B, n, V), the conditional ones first.
        scales: of guidance (B, n), float32.
        guesses: (B, n - 1) int64.
        proposals: the distributions (B, n - 1, V) that they were sampled from; those of the next guesses are written to
            the same place.
        numbers: as of `Chance`.
        divisor, top_k: as of `race_winners`.
        keeps: whether guesses behind the first failure that pass their test stay, as with the coupling "maximal"; else
            they are sampled anew, as with "none".
        relaxation: what guesses may borrow.

    Returns:
        Outcomes and, behind them, how many guesses pass before the first that fails: (B, n + 1), int64.
    """
    places, vocab = logits.shape[1:]
    images, logits, guesses = len(guesses), logits.contiguous(), guesses.contiguous()
    assert proposals.is_contiguous() and numbers.is_contiguous()
    scales = None if scales is None else scales.contiguous()
    distributions = torch.empty(images, places, vocab)
    found = torch.empty(images, places + 1, dtype=torch.long)
    near, width, borrowed = None, 0, 0
    budgets: tuple[float | None, float | None] = (None, None)
    if relaxation is not None:
        near, borrowed = relaxation.neighbours.contiguous(), relaxation.k
        width, budgets = near.shape[1], (relaxation.tv_budget, relaxation.ratio_budget)
    call = _Guesses(
        images, places, vocab, top_k, width, borrowed, keeps, torch.get_num_threads(), divisor,
        *(-1 if budget is None else budget for budget in budgets), logits.data_ptr(),
        None if scales is None else scales.data_ptr(), distributions.data_ptr(), proposals.data_ptr(),
        guesses.data_ptr(), None if near is None else near.data_ptr(), numbers.data_ptr(), found.data_ptr(),
    )  # fmt: skip
    loaded_library().studio_guesses(ctypes.byref(call))
    return found
