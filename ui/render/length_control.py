"""By what a restoration can be cut short: the first tokens of a row, or the first levels of stacks."""

import dataclasses

from studio.errors import StudioError
from studio.ui.server.checks import is_whole, shown

_SCALES = {"OneDPieceTokenizer": ("length", "num_tokens"), "RVQTokenizer": ("depth", "depth")}


@dataclasses.dataclass(frozen=True)
class LengthControl:
    """The keyword of `decode`, "length" in tokens or "depth" in levels, and the most that it may be."""

    name: str
    most: int

    def settings(self, count):
        """The keywords of `decode` for `count`, for all where it is `None`.

        Raises:
            StudioError: it is no whole number from 1 to the most.
        """
        count = self.most if count is None else count
        if not is_whole(count) or not 1 <= count <= self.most:
            raise StudioError(f"Choose a {self.name} from 1 to {self.most}, not {shown(count)}.")
        return {self.name: int(count)}


def length_control(kind, config):
    """The scale of a tokenizer by the name of its class and its configuration; `None` where it has none."""
    if kind not in _SCALES:
        return None
    name, most = _SCALES[kind]
    return LengthControl(name, config[most])
