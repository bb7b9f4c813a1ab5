"""What becomes of drafted tokens, seen from outside: a source of drafts that notes what it proposes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Round:
    """The drafts of one call of the model for one picture.

    Args:
        start: tokens that the picture had before.
        tokens, parents, depths: the nodes of the tree; node 0 is the last token drawn, -1 no parent.
    """

    start: int
    tokens: list
    parents: list
    depths: list


@dataclasses.dataclass(frozen=True)
class TokenFates:
    """How the tokens of one picture came about.

    Args:
        total: tokens of a whole picture.
        drawn: how many are there.
        accepted: places of the tokens that were drafts; the model drew the others itself.
        rejected: number of drafts that did not pass, by place.
        places: those of the tokens that are there, where they are not the first ones.
    """

    total: int
    drawn: int
    accepted: frozenset = frozenset()
    rejected: dict = dataclasses.field(default_factory=dict)
    places: frozenset | None = None


class WatchedDrafts:
    """A source of drafts that does what another does, and keeps the `rounds` of some pictures of one call.

    The call needs a callback: all pictures then stay in the batch until the end.

    Args:
        source: what makes the drafts.
        pictures: the numbers of the watched ones in the call; `rounds` is a list for each.
    """

    def __init__(self, source, pictures):
        self._source, self._pictures = source, pictures
        self.rounds = [[] for _ in pictures]

    def __getattr__(self, name):
        return getattr(self._source, name)

    def begin(self, setting):
        """Fresh state for the call."""
        return _Watched(self._source.begin(setting), self._pictures, self.rounds)


class _Watched:
    def __init__(self, drafting, pictures, rounds):
        self._drafting, self._pictures, self._rounds = drafting, pictures, rounds

    def __getattr__(self, name):
        return getattr(self._drafting, name)

    def propose(self, progress):
        tree = self._drafting.propose(progress)
        seen = (progress.lengths, tree.tokens, tree.parents, tree.depths)
        for rounds, *nodes in zip(self._rounds, *(part[self._pictures].tolist() for part in seen)):
            rounds.append(Round(*nodes))
        return tree


def fates_of(rounds, tokens, total):
    """Tell accepted drafts from rejected ones.

    Args:
        rounds: of the picture, in order; what came of the last one is known only when the picture is whole.
        tokens: its tokens so far, a list.
        total: tokens of a whole picture.
    """
    ends = [later.start for later in rounds[1:]] + ([total] if len(tokens) == total else [])
    accepted, rejected, drawn = set(), {}, min(len(tokens), 1)
    for each, end in zip(rounds, ends):
        if end > len(tokens) or each.start >= total:
            break
        path = _path(each, tokens[each.start : end - 1])
        accepted.update(range(each.start, end - 1))
        for node, (parent, depth) in enumerate(zip(each.parents, each.depths)):
            if parent >= 0 and node not in path:
                place = each.start + depth - 1
                rejected[place] = rejected.get(place, 0) + 1
        drawn = end
    return TokenFates(total, drawn, frozenset(accepted), rejected)


def _path(each, drawn):
    """The nodes that became these tokens."""
    path, node = set(), 0
    for token in drawn:
        node = next(
            child for child, parent in enumerate(each.parents) if parent == node and each.tokens[child] == token
        )
        path.add(node)
    return path
