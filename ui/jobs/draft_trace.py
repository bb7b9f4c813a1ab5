"""Which drafted tokens were accepted and which rejected, recorded from outside of a decoding."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Round:
    """The draft tree of one image in one call of the model.

    Args:
        start: tokens that the image had before.
        tokens, parents, depths: of each node; node 0 is the last sampled token, and parent -1 is none.
    """

    start: int
    tokens: list[int]
    parents: list[int]
    depths: list[int]


@dataclasses.dataclass(frozen=True)
class DraftTrace:
    """The accepted and rejected drafts of one image.

    Args:
        total: tokens of a whole image.
        sampled: tokens sampled so far.
        accepted: positions of the tokens that were drafts; the model sampled the others itself.
        rejected: number of rejected drafts by position.
        positions: of the sampled tokens, where they are not the first ones.
    """

    total: int
    sampled: int
    accepted: frozenset[int] = frozenset()
    rejected: dict[int, int] = dataclasses.field(default_factory=dict)
    positions: frozenset[int] | None = None


def traced(decoding: Any, images: Sequence[int]) -> tuple[Any, list[list[Round]] | None]:
    """The same decoding, which also records the drafts of some images of one call.

    A call with Jacobi decoding needs a callback, so that all images stay in the batch until the end.

    Args:
        decoding: settings, as `decoding=` of a pipeline takes them.
        images: the indices of the traced images in the batch.

    Returns:
        The settings, and a list for each image to which its rounds are added; `None` for a decoding without drafts.
    """
    rounds: list[list[Round]] = [[] for _ in images]
    drafts = getattr(decoding, "drafts", None)
    if hasattr(decoding, "on_round"):
        return _with_callback(decoding, images, rounds), rounds
    if hasattr(drafts, "on_round"):
        return dataclasses.replace(decoding, drafts=_with_callback(drafts, images, rounds)), rounds
    if drafts is not None:
        return dataclasses.replace(decoding, drafts=TracedDrafts(drafts, images, rounds)), rounds
    return decoding, None


def _with_callback(decoding: Any, images: Sequence[int], rounds: list[list[Round]]) -> Any:
    """Jacobi decoding, whose drafts are a sequence."""

    def on_round(lengths: Any, tokens: Any) -> None:
        depths = list(range(tokens.shape[1]))
        parents = [depth - 1 for depth in depths]
        for kept, start, nodes in zip(rounds, lengths[images].tolist(), tokens[images].tolist()):
            kept.append(Round(start, nodes, parents, depths))

    return dataclasses.replace(decoding, on_round=on_round)


class TracedDrafts:
    """Drafts of another source; the rounds of some images of one call are recorded.

    Args:
        source: makes the drafts.
        images: the indices of the traced images in the batch.
        rounds: a list for each, to which a `Round` is added.
    """

    def __init__(self, source: Any, images: Sequence[int], rounds: list[list[Round]]) -> None:
        self._source, self._images, self._rounds = source, images, rounds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedDrafts) and self._source == other._source

    def __hash__(self) -> int:
        return hash(self._source)

    def candidate_generator(self, context: Any) -> "_TracedCandidates":
        """Fresh state for the call."""
        return _TracedCandidates(self._source.candidate_generator(context), self._images, self._rounds)


class _TracedCandidates:
    """`_traced` has the place in the batch of each traced image that is still in it, and its rounds."""

    def __init__(self, candidates: Any, images: Sequence[int], rounds: list[list[Round]]) -> None:
        self._candidates, self._traced = candidates, list(zip(images, rounds))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._candidates, name)

    def get_candidates(self, progress: Any) -> Any:
        tree = self._candidates.get_candidates(progress)
        seen = (progress.lengths, tree.tokens, tree.parents, tree.depths)
        places = [place for place, _ in self._traced]
        for (_, rounds), *nodes in zip(self._traced, *(part[places].tolist() for part in seen)):
            rounds.append(Round(*nodes))
        return tree

    def select(self, images: list[int], rows: list[int]) -> None:
        """Goes on with some images of the batch, which may be traced ones or not."""
        self._candidates.select(images, rows)
        self._traced = [(images.index(place), rounds) for place, rounds in self._traced if place in images]

    def absorb(self, other: "_TracedCandidates", count: int, order: list[int]) -> None:
        """Goes on with the images of another call too, of which others are traced."""
        self._candidates.absorb(other._candidates, count, order)
        self._traced += [(count + place, rounds) for place, rounds in other._traced]


def trace_drafts(rounds: Sequence[Round], tokens: Sequence[int], total: int) -> DraftTrace:
    """Tell accepted drafts from rejected ones.

    Args:
        rounds: of one image, in order; the result of the last one is known only when the image is whole.
        tokens: those of the image so far.
        total: tokens of a whole image.
    """
    ends = [later.start for later in rounds[1:]] + ([total] if len(tokens) == total else [])
    accepted: set[int] = set()
    rejected: dict[int, int] = {}
    sampled = min(len(tokens), 1)
    for each, end in zip(rounds, ends):
        if end > len(tokens) or each.start >= total:
            break
        path = _path(each, tokens[each.start : end - 1])
        accepted.update(range(each.start, end - 1))
        for node, (parent, depth) in enumerate(zip(each.parents, each.depths)):
            position = each.start + depth - 1
            if parent >= 0 and node not in path and position < total:
                rejected[position] = rejected.get(position, 0) + 1
        sampled = end
    return DraftTrace(total, sampled, frozenset(accepted), rejected)


def _path(each: Round, sampled: Sequence[int]) -> set[int]:
    """The nodes of the draft tree that became these tokens."""
    path: set[int] = set()
    node = 0
    for token in sampled:
        node = next(
            child for child, parent in enumerate(each.parents) if parent == node and each.tokens[child] == token
        )
        path.add(node)
    return path
