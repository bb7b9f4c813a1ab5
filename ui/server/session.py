"""Who asks, and whether somebody still listens for the answer.

`studio.ui.server.middleware` knows both from the connections: it writes the client into the scope of a request, and
counts who listens. Where an app runs without that, a session is a client, and everybody is taken to listen.
"""

import ipaddress
import time
from collections import Counter

from gradio.context import LocalContext

CLIENT = "studio.client"  # the key of a scope
_PATIENCE = 10  # seconds without a listener, before the first or after the last


def in_request():
    """Whether a request is being handled."""
    return LocalContext.request.get(None) is not None


def session():
    """Whom the request that is being handled counts for: its client, or its session; `None` outside of requests."""
    asked = LocalContext.request.get(None)
    scope = getattr(getattr(asked, "request", None), "scope", {})
    return asked and (scope.get(CLIENT) or asked.session_hash)


def client_of(host):
    """Whom an address counts for: itself, or its network of IPv6, of which one host has all addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4 or address.ipv4_mapped:
        return str(getattr(address, "ipv4_mapped", None) or address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Listeners:
    """The open connections on which answers are awaited, by session or by event."""

    def __init__(self):
        self._open, self._left = Counter(), {}

    def arrive(self, key):
        """One more listens."""
        self._open[key] += 1

    def leave(self, key):
        """One listens no more."""
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
            now = time.monotonic()
            self._left = {left: when for left, when in self._left.items() if now - when < _PATIENCE} | {key: now}

    def awaits(self, key):
        """Whether somebody listens now."""
        return self._open[key] > 0

    def heard(self, keys, since):
        """Whether somebody listens on one of these, did a moment ago, or may still come, for what began at `since`."""
        latest = max([since, *(self._left.get(key, since) for key in keys)])
        return any(map(self.awaits, keys)) or time.monotonic() - latest < _PATIENCE


_listeners = None


def use_listeners(listeners):
    """Let work from now on go on only while somebody listens; `None` takes everybody to listen."""
    global _listeners
    _listeners = listeners


def listening():
    """A function that says whether somebody still awaits what the request that is being handled asks for."""
    asked, listeners, since = LocalContext.request.get(None), _listeners, time.monotonic()
    if asked is None or listeners is None:
        return lambda: True
    keys = [key for key in (asked.session_hash, LocalContext.event_id.get(None)) if key]
    return lambda: listeners.heard(keys, since)
