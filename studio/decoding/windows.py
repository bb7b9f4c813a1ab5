"""How many tokens a call of Jacobi decoding should read, by measured time."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from studio import backends
from studio.decoding.sampling import Sampling, exponential_noise, fill_exponential
from studio.decoding.trees import path_call
from studio.models.llamagen import LlamaGen

if TYPE_CHECKING:
    from studio.decoding.jacobi import Jacobi

TOKENS_A_CALL = {1: 1.0, 2: 1.47, 3: 1.87, 4: 2.23, 6: 2.85, 8: 3.36, 12: 4.2, 16: 5.3, 24: 6.6, 32: 7.8}
"""Tokens of an image for a call by window, as measured on a model of 256 tokens an image."""
CPU_ROWS, _OTHER_WINDOW = 6, 16
_WORTH = 1.1
"""Of plain steps, the speed that guesses must be expected to have: what is measured leaves out what is around it."""
_windows: "weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, int]]" = weakref.WeakKeyDictionary()


def choose_window(model: LlamaGen, settings: "Jacobi", batch: int, streams: int) -> int:
    """The window of settings, for a batch of images with `streams` sequences each; see `Jacobi`.

    Rounds are timed with the sampling in them, from a window of 8 sequences' tokens on a CPU on to larger and smaller
    ones as long as more tokens a second are to be expected, once for a model, device and batch.
    """
    if not isinstance(settings.window, str):
        return settings.window
    on_cpu = model.device.type == "cpu"
    if settings.coupling not in (None, "seed"):
        return CPU_ROWS // streams if on_cpu else _OTHER_WINDOW
    known = _windows.setdefault(model, {})
    key = (batch, streams, model.device, model.dtype, settings.weights, torch.get_num_threads())
    if key not in known:
        first = CPU_ROWS / (batch * streams) if on_cpu else _OTHER_WINDOW
        known[key] = _fastest_window(model, batch, streams, settings.weights, first)
    return known[key]


def _round_seconds(model: LlamaGen, batch: int, streams: int, window: int, weights: str) -> float:
    """Least seconds of a round, or of a plain step where the window is 1: of a call, and of sampling behind it.

    Of sampling, that is noise for each new token, and a race for each place of the window.
    """
    device, vocab = model.device, model.config.vocab_size
    logits, generator = torch.zeros(batch * window, vocab, device=device), torch.Generator(device)
    noise = exponential_noise(1, vocab, [generator], device).expand(len(logits), -1).contiguous()

    def least(work: Callable[[], Any]) -> float:
        return min([backends.timed(work, device)[0] for _ in range(5)][1:])

    call = least(path_call(model, batch * streams, window, weights))
    race = least(lambda: Sampling().winners(logits, noise))
    return call + race + batch * TOKENS_A_CALL[window] * least(lambda: fill_exponential(noise[0], generator))


def _fastest_window(model: LlamaGen, batch: int, streams: int, weights: str, first: float) -> int:
    windows, speeds = list(TOKENS_A_CALL), {}

    def speed(place: int) -> float:
        if not 0 <= place < len(windows):
            return 0.0
        if place not in speeds:
            seconds = _round_seconds(model, batch, streams, windows[place], weights)
            speeds[place] = TOKENS_A_CALL[windows[place]] / seconds
        return speeds[place]

    best = min(range(len(windows)), key=lambda place: abs(windows[place] - first))
    for step in (1, -1):
        while speed(best + step) > speed(best):
            best += step
    return windows[best] if speed(best) > _WORTH * speed(0) else 1
