"""Drafts without training: what followed the last time that the latest tokens stood in the picture.

Prompt lookup ("Inference with Reference", arXiv:2304.04487), with several continuations as branches of a tree.
"""

from dataclasses import dataclass

from studio.checks import check_integer, set_fields
from studio.decoding.drafts import Memoryless, Progress, Setting
from studio.decoding.trees import MAX_NODES, Tree, trees_of
from studio.errors import StudioError


@dataclass(frozen=True)
class NGram:
    """Settings.

    Args:
        longest: most tokens that are compared; fewer, down to 1, where so many never stood together before.
        branches: most continuations, the latest first.
        levels: tokens of a continuation.

    Errors: `StudioError` for numbers below 1.
    """

    longest: int = 3
    branches: int = 2
    levels: int = 3

    drawn = False

    def __post_init__(self):
        for name in ("longest", "branches", "levels"):
            set_fields(self, **{name: check_integer(f"{name} of n-gram drafts", getattr(self, name), 1, MAX_NODES)})
        nodes = self.branches * self.levels
        if nodes > MAX_NODES:
            raise StudioError(f"n-gram drafts have at most {MAX_NODES} nodes, not {nodes}: lower branches or levels.")

    def begin(self, setting: Setting) -> "_NGramDrafting":
        return _NGramDrafting(self)


class _NGramDrafting(Memoryless):
    def __init__(self, settings: NGram):
        self.settings, self.nodes = settings, 1 + settings.branches * settings.levels

    def propose(self, progress: Progress) -> Tree:
        lengths, rooms = progress.lengths.tolist(), progress.room.tolist()
        rows = [
            _tree(tokens[:length], continuations(tokens[:length], self.settings, min(room, self.settings.levels)))
            for tokens, length, room in zip(progress.tokens.tolist(), lengths, rooms)
        ]
        return trees_of(rows, progress.tokens.device)


def continuations(tokens: list[int], settings: NGram, levels: int) -> list[list[int]]:
    """At most `branches` lists of at most `levels` tokens, those after the longest repeats first, then the latest."""
    found: list[list[int]] = []
    for length in range(min(settings.longest, len(tokens) - 1), 0, -1):
        latest = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if levels and tokens[end - length : end] == latest:
                following = tokens[end : end + levels]
                if following not in found:
                    found.append(following)
                if len(found) == settings.branches:
                    return found
    return found


def _tree(tokens: list[int], paths: list[list[int]]) -> tuple[list[int], list[int]]:
    """Tokens and parents of the tree of all paths below the last token, in level order."""
    nodes = sorted({tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}, key=lambda p: _order(p, paths))
    number = {(): 0, **{node: place + 1 for place, node in enumerate(nodes)}}
    return [tokens[-1], *(node[-1] for node in nodes)], [-1, *(number[node[:-1]] for node in nodes)]


def _order(node: tuple[int, ...], paths: list[list[int]]) -> tuple[int, int]:
    """Level by level, and within a level as the paths come."""
    return len(node), next(place for place, path in enumerate(paths) if tuple(path[: len(node)]) == node)
