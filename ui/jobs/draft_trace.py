"""What becomes of drafted tokens, seen from outside: a decoding whose drafts are noted."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Round:
    """The drafts of one call of the model for one image.

    Args:
        start: tokens that the image had before.
        tokens, parents, depths: the nodes of the tree; node 0 is the last token sampled, -1 no parent.
    """

    start: int
    tokens: list
    parents: list
    depths: list


@dataclasses.dataclass(frozen=True)
class DraftTrace:
    """How the tokens of one image came about.

    Args:
        total: tokens of a whole image.
        sampled: how many are there.
        accepted: places of the tokens that were drafts; the model drew the others itself.
        rejected: number of drafts that did not pass, by place.
        places: those of the tokens that are there, where they are not the first ones.
    """

    total: int
    sampled: int
    accepted: frozenset = frozenset()
    rejected: dict = dataclasses.field(default_factory=dict)
    places: frozenset | None = None


def watched(decoding, images):
    """A decoding that does what another does, and what it notes of some images of one call.

    The call needs a callback: all images then stay in the batch until the end.

    Args:
        decoding: settings, as `decoding=` of a pipeline takes them.
        images: the numbers of the watched ones in the call.

    Returns:
        The settings, and a list of `Round` for each image; None for a decoding that makes no drafts.
    """
    rounds = [[] for _ in images]
    drafts = getattr(decoding, "drafts", None)
    if hasattr(decoding, "on_round"):
        return _noting(decoding, images, rounds), rounds
    if hasattr(drafts, "on_round"):
        return dataclasses.replace(decoding, drafts=_noting(drafts, images, rounds)), rounds
    if drafts is not None:
        return dataclasses.replace(decoding, drafts=TracedDrafts(drafts, images, rounds)), rounds
    return decoding, None


def _noting(decoding, images, rounds):
    """Jacobi decoding, whose drafts follow one another."""

    def on_round(lengths, tokens):
        depths = list(range(tokens.shape[1]))
        parents = [depth - 1 for depth in depths]
        for kept, start, nodes in zip(rounds, lengths[images].tolist(), tokens[images].tolist()):
            kept.append(Round(start, nodes, parents, depths))

    return dataclasses.replace(decoding, on_round=on_round)


class TracedDrafts:
    """Drafts as of other settings, which keep the rounds of some images of one call.

    Args:
        source: what makes the drafts.
        images: the numbers of the watched ones in the call.
        rounds: a list for each, to which a `Round` is added.
    """

    def __init__(self, source, images, rounds):
        self._source, self._images, self._rounds = source, images, rounds

    def __getattr__(self, name):
        return getattr(self._source, name)

    def candidate_generator(self, context):
        """Fresh state for the call."""
        return _Watched(self._source.candidate_generator(context), self._images, self._rounds)


class _Watched:
    def __init__(self, candidates, images, rounds):
        self._candidates, self._images, self._rounds = candidates, images, rounds

    def __getattr__(self, name):
        return getattr(self._candidates, name)

    def get_candidates(self, progress):
        tree = self._candidates.get_candidates(progress)
        seen = (progress.lengths, tree.tokens, tree.parents, tree.depths)
        for rounds, *nodes in zip(self._rounds, *(part[self._images].tolist() for part in seen)):
            rounds.append(Round(*nodes))
        return tree


def fates_of(rounds, tokens, total):
    """Tell accepted drafts from rejected ones.

    Args:
        rounds: of the image, in order; what came of the last one is known only when the image is whole.
        tokens: its tokens so far, a list.
        total: tokens of a whole image.
    """
    ends = [later.start for later in rounds[1:]] + ([total] if len(tokens) == total else [])
    accepted, rejected, sampled = set(), {}, min(len(tokens), 1)
    for each, end in zip(rounds, ends):
        if end > len(tokens) or each.start >= total:
            break
        path = _path(each, tokens[each.start : end - 1])
        accepted.update(range(each.start, end - 1))
        for node, (parent, depth) in enumerate(zip(each.parents, each.depths)):
            place = each.start + depth - 1
            if parent >= 0 and node not in path and place < total:
                rejected[place] = rejected.get(place, 0) + 1
        sampled = end
    return DraftTrace(total, sampled, frozenset(accepted), rejected)


def _path(each, sampled):
    """The nodes that became these tokens."""
    path, node = set(), 0
    for token in sampled:
        node = next(
            child for child, parent in enumerate(each.parents) if parent == node and each.tokens[child] == token
        )
        path.add(node)
    return path
