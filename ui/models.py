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
            loaded.set_progress_bar_config(disable=True)
            _pipelines[name] = loaded
        return _pipelines[name]
