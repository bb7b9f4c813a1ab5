"""The app for many people: each device has a queue of its own, and limits hold for all requests."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from studio.checkpoints.bundled import BUNDLED
from studio.checkpoints.published import pulled_folder
from studio.checks import shown
from studio.errors import StudioError
from studio.ui.app import launch
from studio.ui.server.limits import Limits, set_limits
from studio.ui.server.models import Device, bundled_models, get_pipeline, get_reader, pulled_pipelines
from studio.ui.server.rate_limits import RateLimiter, Rates
from studio.ui.server.run import open_socket
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.worker import DeviceWorker, use_workers
from studio.ui.tabs.components import short_name

CONNECTIONS = 64  # of one client for each request that may wait; a page has two, and a program about three


def serve(
    host: str,
    port: int,
    *,
    model: str,
    devices: Sequence[Device],
    queue_limits: QueueLimits,
    limits: Limits,
    rates: Rates | None = None,
    **settings: Any,
) -> None:
    """Load the model onto every device, and serve the app until it is interrupted.

    It listens before it loads: an address that is taken is noticed at once, and requests wait until the model is there.

    Args:
        host, port: where to listen.
        model, devices, queue_limits, limits, rates: as of `prepare`.
        settings: passed on to `studio.ui.app.launch`.

    Raises:
        StudioError: as of `prepare`, or nothing can listen there.
    """
    with open_socket(host, port) as listening:
        how = prepare(model, devices, queue_limits, limits, rates)
        launch(host, port, listening=listening, **how, **settings)


def prepare(
    model: str, devices: Sequence[Device], queue_limits: QueueLimits, limits: Limits, rates: Rates | None = None
) -> dict[str, Any]:
    """Set the limits of this process, and load the model onto every device.

    Requests may use the model, the bundled and the pulled ones, and no other: they cannot name a folder or a
    repository. A model folder is called by its last part in requests, messages and images.

    Args:
        model: what `studio.load` takes; the Generate tab samples with it.
        devices: one worker is made for each.
        queue_limits: of the queue of each device.
        limits: of a request; its `models` are replaced.
        rates: of each client.

    Returns:
        The settings for `studio.ui.app.launch`: "model", "places" and "open_requests".

    Raises:
        StudioError: the model cannot be loaded, or a device is not there or named twice.
    """
    if len(set(devices)) < len(devices):
        raise StudioError("One of the devices is named twice: leave one of them out.")
    name = offer(model, limits)
    for device in devices:
        get_pipeline(name, device)
    use_workers([DeviceWorker(device, queue_limits) for device in devices], RateLimiter(rates))
    return {
        "model": name,
        "places": len(devices) * (queue_limits.max_waiting + queue_limits.max_batch),
        "open_requests": CONNECTIONS * queue_limits.max_per_client,
    }


def prepare_replica(name: str, source: str, device: Device, queue_limits: QueueLimits, limits: Limits) -> None:
    """Load one model, a pipeline or a bundled reader, and let this process do requests for it and for no other.

    Args:
        name, source: of the model, as of `named_sources`.
        device: where it runs.
        queue_limits, limits: as of `prepare`.

    Raises:
        StudioError: the model cannot be loaded.
    """
    set_limits(replace(limits, models={name: source}))
    load = get_reader if name in bundled_models("reader") else get_pipeline
    load(name, device)
    use_workers([DeviceWorker(device, queue_limits)])


def named_sources(models: Sequence[str]) -> dict[str, str]:
    """What `studio.load` takes for each model, by what requests call it: the last part of a folder.

    Raises:
        StudioError: two have the same name.
    """
    sources: dict[str, str] = {}
    for model in (str(model).strip() for model in models):
        name = model if model in BUNDLED else short_name(model)
        name = f"own-{name}" if name in BUNDLED and name != model else name
        if name in sources or not model:
            raise StudioError(f"Give each model once, and each folder a name of its own: {shown(model)}.")
        sources[name] = model
    return sources


def offer(model: str, limits: Limits) -> str:
    """Set the limits of this process: requests may use a model, the bundled and the pulled ones, and no other.

    Args:
        model: what `studio.load` takes.
        limits: of a request; its `models` are replaced.

    Returns:
        What the model is called in requests: a folder and a repository by their last part.
    """
    offered = {name: name for kind in ("pipeline", "tokenizer", "reader") for name in bundled_models(kind)}
    offered |= {name: str(pulled_folder(name)) for name in pulled_pipelines()}
    own = named_sources([model])
    set_limits(replace(limits, models=own | offered))
    return next(iter(own))


def devices_of(text: str | None, dtype: str | None) -> list[Device]:
    """The devices of a list such as "cuda:0,cuda:1"; for `None` the one that `studio.load` chooses by itself."""
    return [Device(name.strip() or None, dtype) for name in (text or "").split(",")]
