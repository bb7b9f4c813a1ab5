"""The app for many: every device samples what waits in a queue of its own, within limits that hold for all."""

from dataclasses import replace

from studio.checkpoints.bundled import BUNDLED
from studio.errors import StudioError
from studio.ui.app import launch
from studio.ui.server.limits import set_limits
from studio.ui.server.models import Device, bundled_models, get_pipeline
from studio.ui.server.worker import DeviceWorker, use_workers
from studio.ui.tabs.components import short_name

_CONNECTIONS = 64  # of one client for each request that may wait; a page has two, and a program about three


def serve(host, port, *, model, devices, bounds, limits, **settings):
    """Load the model onto every device, and serve the app until it is interrupted.

    Args:
        host, port: where to listen.
        settings: passed on to `studio.ui.app.launch`.
        model, devices, bounds, limits: as of `prepare`.

    Raises:
        StudioError: as of `prepare`, or nothing can listen there.
    """
    launch(host, port, **prepare(model, devices, bounds, limits), **settings)


def prepare(model, devices, bounds, limits):
    """Let this process work within limits, and load the model onto every device.

    Requests may use the model and the bundled ones, and no other: none of them names a folder or a repository. A folder
    is called by its last part, in requests, messages and images.

    Args:
        model: what `studio.load` takes; it samples in the Generate tab.
        devices: a `Device` each.
        bounds: those of the queue of every device.
        limits: what a request may ask for.

    Returns:
        The settings for `studio.ui.app.launch` that follow.

    Raises:
        StudioError: the model cannot be loaded, or a device is not there or named twice.
    """
    if len(set(devices)) < len(devices):
        raise StudioError("One of the devices is named twice: leave one of them out.")
    offered = {name: name for kind in ("pipeline", "tokenizer", "reader") for name in bundled_models(kind)}
    name = model if model in BUNDLED else short_name(model)
    name = f"own-{name}" if name in BUNDLED and name != model else name
    set_limits(replace(limits, models={name: str(model)} | offered))
    for device in devices:
        get_pipeline(name, device)
    use_workers([DeviceWorker(device, bounds) for device in devices])
    return {
        "model": name,
        "places": len(devices) * (bounds.waiting + bounds.together),
        "open_requests": _CONNECTIONS * bounds.of_one,
    }


def devices_of(text, dtype):
    """The `Device`s of a list such as "cuda:0,cuda:1"; that which `studio.load` takes by itself where it is `None`."""
    return [Device(name.strip() or None, dtype) for name in (text or "").split(",")]
