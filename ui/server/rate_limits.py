"""How much one client may ask for within a minute."""

import math
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from studio.errors import StudioError
from studio.ui.server.scheduler import Overloaded

_MINUTE = 60.0  # seconds


@dataclass(frozen=True)
class Rates:
    """The most that one client may ask for within any minute.

    Args:
        requests: that need a model.
        images: that are to be sampled.
    """

    requests: float = math.inf
    images: float = math.inf


class RateLimiter:
    """Counts the requests of each client in the last minute.

    Args:
        rates: of every client.
    """

    def __init__(self, rates: Rates | None = None) -> None:
        self.rates = rates or Rates()
        self._asked: dict[Hashable, deque[tuple[float, int]]] = {}

    def check(self, client: Hashable, images: int) -> None:
        """Check that a client may ask for this now.

        Raises:
            Overloaded: it has asked too much in the last minute.
            StudioError: it asks for more images than a minute ever allows.
        """
        rates = self.rates
        if math.isinf(rates.requests) and math.isinf(rates.images):
            return
        if images > rates.images:
            raise StudioError(f"You may ask for {rates.images:g} images a minute, not {images} at once: ask for fewer.")
        now = time.monotonic()
        asked = self._recent(client, now)
        for most, used, new, what in (
            (rates.requests, len(asked), 1, "requests"),
            (rates.images, sum(count for _, count in asked), images, "images"),
        ):
            if used + new > most:
                sentence = f"You may ask for {most:g} {what} a minute, and have asked for {used}: wait a little."
                raise Overloaded(sentence, 429, asked[0][0] + _MINUTE - now if asked else _MINUTE)

    def count(self, client: Hashable, images: int) -> None:
        """Count a request that was taken."""
        if not math.isinf(min(self.rates.requests, self.rates.images)):
            self._asked.setdefault(client, deque()).append((time.monotonic(), images))

    def forget(self, client: Hashable, images: int) -> None:
        """Take back the newest count of such a request, which was refused after all."""
        asked = self._asked.get(client, deque())
        if entry := next((entry for entry in reversed(asked) if entry[1] == images), None):
            asked.remove(entry)

    def _recent(self, client: Hashable, now: float) -> "deque[tuple[float, int]]":
        """What a client asked for in the last minute; clients that have not asked since then are forgotten."""
        for name, asked in list(self._asked.items()):
            while asked and now - asked[0][0] > _MINUTE:
                asked.popleft()
            if not asked:
                del self._asked[name]
        return self._asked.get(client, deque())
