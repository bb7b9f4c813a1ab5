"""Which requests a device does next: those of many clients, in turn, within limits, compatible ones in one batch.

Nothing here runs or waits for anything; `studio.ui.server.worker` does.
"""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

from studio.errors import StudioError

_RETRY = 2  # seconds after which a place may be free


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait for a device, and how much it does at once.

    Args:
        max_waiting: requests that wait, at most.
        max_per_client: those of one client among them, at most.
        max_batch: images in one call, at most; a single request may have more.
        continuous: whether requests join and leave a running batch where the model can do that.
    """

    max_waiting: float = math.inf
    max_per_client: float = math.inf
    max_batch: int = 1
    continuous: bool = False


class Queued(Protocol):
    """A request in a queue.

    `batch_key` is equal for requests that may be done in one call (`None`: only alone), `size` the number of images.
    """

    @property
    def client(self) -> Hashable: ...

    @property
    def batch_key(self) -> Hashable: ...

    @property
    def size(self) -> int: ...


Q = TypeVar("Q", bound=Queued)


class Overloaded(StudioError):
    """A request that is refused now and may be taken later.

    Args:
        sentence: the message.
        status: of HTTP: 429 where the client has asked too much, 503 where the server has too much to do, or stops.
        retry_after: seconds.
    """

    def __init__(self, sentence: str, status: int, retry_after: float) -> None:
        super().__init__(sentence)
        self.status, self.retry_after = status, retry_after


class FairQueue(Generic[Q]):
    """Requests that wait for one device.

    Clients take turns. A turn is the first request of one client, and as many compatible ones as fit that are first of
    theirs. A client whose request was taken goes to the end of the line, so nobody waits for more than one turn of
    every other client, and the requests of one client keep their order.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._waiting: dict[Hashable, deque[Q]] = {}  # by client, the one whose turn is next first

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def images(self) -> int:
        """The number of images that wait."""
        return sum(request.size for requests in self._waiting.values() for request in requests)

    def add(self, request: Q) -> None:
        """Let a request wait.

        Raises:
            Overloaded: the queue is full, or the client has as many requests in it as one may have.
        """
        if len(self._waiting.get(request.client, ())) >= self.limits.max_per_client:
            waiting = f"You have {self.limits.max_per_client} requests waiting already: try again when one is done."
            raise Overloaded(waiting, 429, _RETRY)
        if len(self) >= self.limits.max_waiting:
            full = f"All {self.limits.max_waiting} places in the queue are taken: try again in a moment."
            raise Overloaded(full, 503, _RETRY)
        self._waiting.setdefault(request.client, deque()).append(request)

    def remove(self, request: Q) -> None:
        """Forget a request, if it still waits."""
        waiting = self._waiting.get(request.client, deque())
        if request in waiting:
            waiting.remove(request)
            if not waiting:
                del self._waiting[request.client]

    def in_order(self) -> list[Q]:
        """All requests in the order of their turns, as if each were done alone."""
        rounds = zip_longest(*self._waiting.values())
        return [request for turns in rounds for request in turns if request is not None]

    def take(self) -> list[Q]:
        """Take the requests to do next, in one call; empty where none waits."""
        if not self._waiting:
            return []
        batch = [self._take_first(next(iter(self._waiting)))]
        first, room = batch[0], self.limits.max_batch - batch[0].size
        while first.batch_key is not None and (other := self._compatible(first, room)):
            batch.append(self._take_first(other.client))
            room -= other.size
        return batch

    def take_next(self, batch_key: Hashable, room: int) -> Q | None:
        """Take the next request in turn if it has this key and at most `room` images; nobody is passed over."""
        client = next(iter(self._waiting), None)
        head = self._waiting[client][0] if self._waiting else None
        if head is None or head.batch_key != batch_key or head.size > room:
            return None
        return self._take_first(client)

    def _compatible(self, first: Q, room: int) -> Q | None:
        """The next client's first request that may be done with `first` and fits."""
        heads = (requests[0] for requests in self._waiting.values())
        return next((head for head in heads if head.batch_key == first.batch_key and head.size <= room), None)

    def _take_first(self, client: Hashable) -> Q:
        """Take the first request of a client, who goes to the end of the line."""
        requests = self._waiting.pop(client)
        request = requests.popleft()
        if requests:
            self._waiting[client] = requests
        return request
