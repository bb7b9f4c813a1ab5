"""Who asks: the session of the request that is being handled."""

from gradio.context import LocalContext


def in_request():
    """Whether a request is being handled."""
    return LocalContext.request.get(None) is not None


def visitor():
    """The session of a browser tab or a client; `None` outside of requests."""
    request = LocalContext.request.get(None)
    return request and request.session_hash
