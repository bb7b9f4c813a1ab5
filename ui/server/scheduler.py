"""Whose turn it is on a device: requests of many users, bounded, fair, and equal ones together.

Nothing here runs or waits for anything; `studio.ui.server.worker` does.
"""

import math
from collections import deque
from dataclasses import dataclass
from itertools import zip_longest

from studio.errors import StudioError


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait for a device, and how much it does at once.

    Args:
        waiting: requests that wait, at most.
        of_one: those of one user among them, at most.
        together: images in one call, at most; a single request may hold more.
    """

    waiting: float = math.inf
    of_one: float = math.inf
    together: int = 1


class FairQueue:
    """Requests that wait for one device.

    A request has a `user`; `like`, equal for requests that may be done in one call (`None`: only alone); and `size`,
    the number of its images. Users take turns: a turn is the first request of one user, and as many equal ones as fit
    that are first of theirs. Whoever had a request taken is behind all others then, so nobody waits for more than one
    turn of every other user, and the requests of one user keep their order.
    """

    def __init__(self, bounds):
        self.bounds = bounds
        self._waiting = {}  # user -> deque of requests, the user whose turn is next first

    def __len__(self):
        return sum(map(len, self._waiting.values()))

    @property
    def images(self):
        """How many images wait."""
        return sum(request.size for requests in self._waiting.values() for request in requests)

    def add(self, request):
        """Let a request wait. Errors: `StudioError` where it, or its user, has no room."""
        if len(self._waiting.get(request.user, ())) >= self.bounds.of_one:
            raise StudioError(f"You have {self.bounds.of_one} requests waiting already: try again when one is done.")
        if len(self) >= self.bounds.waiting:
            raise StudioError(f"All {self.bounds.waiting} places in the queue are taken: try again in a moment.")
        self._waiting.setdefault(request.user, deque()).append(request)

    def remove(self, request):
        """Forget a request, if it still waits."""
        waiting = self._waiting.get(request.user, ())
        if request in waiting:
            waiting.remove(request)
            self._forget_if_idle(request.user)

    def places(self):
        """The requests in the order of their turns, were each done alone."""
        rounds = zip_longest(*self._waiting.values())
        return [request for turns in rounds for request in turns if request is not None]

    def take(self):
        """The requests to do next, in one call; none where none waits."""
        if not self._waiting:
            return []
        group = [self._take_first(next(iter(self._waiting)))]
        first, room = group[0], self.bounds.together - group[0].size
        while first.like is not None and (rider := self._rider(first, room)):
            group.append(self._take_first(rider.user))
            room -= rider.size
        return group

    def _rider(self, first, room):
        """The next user's first request that is equal and fits; `None` where there is none."""
        heads = (requests[0] for requests in self._waiting.values())
        return next((head for head in heads if head.like == first.like and head.size <= room), None)

    def _take_first(self, user):
        """The first request of a user, who is behind all others then."""
        requests = self._waiting.pop(user)
        request = requests.popleft()
        if requests:
            self._waiting[user] = requests
        return request

    def _forget_if_idle(self, user):
        if not self._waiting[user]:
            del self._waiting[user]
