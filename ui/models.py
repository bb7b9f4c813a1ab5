"""The pipelines this process has loaded: each once, on first use, shared by every visitor."""

import threading

_pipelines = {}
_lock = threading.Lock()


def get_pipeline(name):
    """Return the pipeline called `name` (whatever `studio.load` takes), loading it when it is asked for the first time.

    Raises:
        StudioError: it cannot be loaded, or it is something that cannot draw.
    """
    import studio

    with _lock:
        if name not in _pipelines:
            loaded = studio.load(name)
            if not hasattr(loaded, "image_tokenizer"):
                raise studio.StudioError(
                    f"{name} turns pictures into tokens and cannot draw: choose one such as emoji-ar."
                )
            _pipelines[name] = loaded
        return _pipelines[name]


def is_loaded(name):
    """Whether `get_pipeline(name)` answers at once."""
    return name in _pipelines
