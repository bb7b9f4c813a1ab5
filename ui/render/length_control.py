"""How many of an image's tokens to decode: the first tokens of a sequence, or the first levels of residual codes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from studio.checks import as_integer, check_integer

_CONTROLS = {"OneDPieceTokenizer": ("length", "num_tokens"), "RVQTokenizer": ("depth", "depth")}


@dataclasses.dataclass(frozen=True)
class LengthControl:
    """A keyword of `decode`.

    Args:
        name: "length" in tokens or "depth" in levels.
        most: its largest value.
    """

    name: str
    most: int

    def settings(self, count: int | None) -> dict[str, int]:
        """The keyword of `decode` by name.

        Args:
            count: from 1 to `most`; `None` for all.

        Raises:
            StudioError: no whole number of that range.
        """
        count = self.most if count is None else as_integer(count)
        return {self.name: check_integer(f"The {self.name}", count, 1, self.most)}


def length_control(kind: str | None, config: Mapping[str, Any]) -> LengthControl | None:
    """The control of a tokenizer by the name of its class and its configuration; `None` where it has none."""
    if kind not in _CONTROLS:
        return None
    name, most = _CONTROLS[kind]
    return LengthControl(name, config[most])
