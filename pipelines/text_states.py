"""States of a text encoder: of the real tokens only, and kept for the next use of a prompt."""

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from studio import backends

PROMPTS = 64
"""Prompts of an encoder whose states are kept."""


class TextStates:
    """The states of the prompts that were used last, for each encoder until one of its weights changes or moves."""

    def __init__(self, prompts: int = PROMPTS) -> None:
        self._prompts, self._lock = prompts, threading.Lock()
        self._kept: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, OrderedDict]] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, encoder: nn.Module, prompts: list[list[int]], device: torch.device) -> list[torch.Tensor]:
        """States (n, dim) of each prompt, n text tokens that are no padding; they must not be written to.

        On a CPU each prompt is encoded alone, elsewhere with those of the same length: states depend on nothing else.

        Args:
            encoder: with the interface of `T5EncoderModel`, in evaluation mode.
            prompts: text tokens.
            device: of the results.
        """
        kept, dtype = self._of(encoder), next(encoder.parameters()).dtype
        keys = [(tuple(prompt), dtype, device, backends.forced()) for prompt in prompts]
        with self._lock:
            found = {key: kept[key] for key in keys if key in kept}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for group in _groups(missing, alone=device.type == "cpu"):
            found.update(zip(group, _encode(encoder, [key[0] for key in group], device)))
        with self._lock:
            for key in keys:
                kept[key] = found[key]
                kept.move_to_end(key)
            while len(kept) > self._prompts:
                kept.popitem(last=False)
        return [found[key] for key in keys]

    def _of(self, encoder: nn.Module) -> OrderedDict:
        """What is kept of this encoder as it is now."""
        signature = None if encoder.training else backends.signature(encoder)
        if signature is None:
            return OrderedDict()
        with self._lock:
            if encoder not in self._kept or self._kept[encoder][0] != signature:
                self._kept[encoder] = (signature, OrderedDict())
            return self._kept[encoder][1]


def _groups(keys: list[tuple], alone: bool) -> list[list[tuple]]:
    if alone:
        return [[key] for key in keys]
    groups: dict[int, list[tuple]] = {}
    for key in keys:
        groups.setdefault(len(key[0]), []).append(key)
    return list(groups.values())


def _encode(encoder: Any, prompts: list[tuple], device: torch.device) -> torch.Tensor:
    """States (B, n, dim) of prompts of one length."""
    if not prompts[0]:
        return torch.zeros(len(prompts), 0, encoder.config.hidden_size, device=device)
    ids = torch.tensor(prompts, device=device)
    native = backends.select_text(encoder)
    if native is not None:
        return native(ids)
    return encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


text_states = TextStates()
"""Of all pipelines of this process, which may share encoders."""
