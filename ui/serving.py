"""The app for many: every device draws what waits in a queue of its own, within limits that hold for all."""

from dataclasses import replace

from starlette.middleware import Middleware

from studio.errors import StudioError
from studio.ui.app import launch
from studio.ui.gate import Gate
from studio.ui.limits import set_limits
from studio.ui.models import Device, bundled_models, get_pipeline
from studio.ui.worker import Station, use_stations


def serve(host, port, *, model, devices, bounds, limits, upload_bytes, **settings):
    """Load the model onto every device, and serve the app until it is interrupted.

    Requests may use the model and the bundled ones, and no other: none of them names a folder or a repository.

    Args:
        host, port: where to listen.
        model: what `studio.load` takes; it draws in the Generate tab.
        devices: a `Device` each.
        bounds: those of the queue of every device.
        limits: what a request may ask for.
        upload_bytes: of a file, at most.
        settings: passed on to Gradio's `launch`.

    Raises:
        StudioError: the model cannot be loaded, a device is not there or named twice, or nothing can listen there.
    """
    if len(set(devices)) < len(devices):
        raise StudioError("One of the devices is named twice: leave one of them out.")
    offered = [name for kind in ("pipeline", "tokenizer", "reader") for name in bundled_models(kind)]
    set_limits(replace(limits, models=tuple(dict.fromkeys([model, *offered]))))
    for device in devices:
        get_pipeline(model, device)
    use_stations([Station(device, bounds) for device in devices])
    return launch(
        host,
        port,
        model=model,
        places=len(devices) * (bounds.waiting + bounds.together),
        max_file_size=upload_bytes,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Gate)]},
        **settings,
    )


def devices_of(text, dtype):
    """The `Device`s of a list such as "cuda:0,cuda:1"; that which `studio.load` takes by itself where it is `None`."""
    return [Device(name.strip() or None, dtype) for name in (text or "").split(",")]
