"""Which client sends a request, and whether somebody still listens for the answer.

`studio.ui.server.middleware` knows both from the connections: it writes the client into the scope of a request, and
counts listeners. Without it each session is a client, and everybody counts as listening.
"""

import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from gradio.context import LocalContext

CLIENT = "studio.client"  # the key of a scope
LISTENER = "studio.listener"  # the key of a scope: the call of a tool that a request is a part of
Asker = tuple[Hashable, Callable[[], bool]]
ASKER: ContextVar[Asker | None] = ContextVar("asker", default=None)
"""The client of a request that Gradio does not handle, and whether it still listens."""
_PATIENCE = 10  # seconds without a listener, before the first or after the last


def in_request() -> bool:
    """Whether a request is being handled."""
    return LocalContext.request.get(None) is not None


def session() -> Hashable:
    """The client that the current request counts for, or its session; `None` outside of requests."""
    if asker := ASKER.get():
        return asker[0]
    asked = LocalContext.request.get(None)
    return asked and (_scope(asked).get(CLIENT) or asked.session_hash)


def _scope(asked: Any) -> Mapping[str, Any]:
    """The scope of a request of Gradio."""
    return getattr(getattr(asked, "request", None), "scope", {})


def client_of(host: str) -> str:
    """The client that an address counts for: itself, or its /64 network of IPv6, where one host has all addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4 or address.ipv4_mapped:
        return str(getattr(address, "ipv4_mapped", None) or address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Listeners:
    """The open connections on which answers are awaited, by session or by event."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._left: dict[str, float] = {}

    def arrive(self, key: str) -> None:
        """Count a new listener."""
        self._open[key] += 1

    def leave(self, key: str) -> None:
        """Count a listener less."""
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
            now = time.monotonic()
            self._left = {left: when for left, when in self._left.items() if now - when < _PATIENCE} | {key: now}

    def awaits(self, key: str) -> bool:
        """Whether somebody listens now."""
        return self._open[key] > 0

    def heard(self, keys: Iterable[str], since: float) -> bool:
        """Whether somebody listens on one of these, did a moment ago, or may still come, for work begun at `since`."""
        keys = list(keys)
        latest = max([since, *(self._left.get(key, since) for key in keys)])
        return any(map(self.awaits, keys)) or time.monotonic() - latest < _PATIENCE


_listeners: Listeners | None = None


def use_listeners(listeners: Listeners | None) -> None:
    """Stop work from now on when nobody listens; with `None` everybody counts as listening."""
    global _listeners
    _listeners = listeners


def listening() -> Callable[[], bool]:
    """A function that says whether somebody still awaits the answer to the current request."""
    if asker := ASKER.get():
        return asker[1]
    asked, listeners, since = LocalContext.request.get(None), _listeners, time.monotonic()
    if asked is None or listeners is None:
        return lambda: True
    called = _scope(asked).get(LISTENER)  # the server itself listens for the answer of a tool, whoever called it
    keys = [called] if called else [key for key in (asked.session_hash, LocalContext.event_id.get(None)) if key]
    return lambda: listeners.heard(keys, since)
