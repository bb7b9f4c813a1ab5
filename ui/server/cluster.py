"""The API on Ray Serve: replicas of models on the machines of a cluster, behind one entry.

The entry has no model. It knows the clients, checks their keys and limits, and sends each request to a replica of the
model that it names, the less busy of two chosen at random. A replica has one model on one device, and batches
continuously as `studio serve` does. Ray Serve starts replicas, asks each whether it is well, replaces those that are
not, and with `replicas: auto` keeps as many as there is work for.

    serve run studio.ui.server.cluster:application models=emoji-ar,emoji-mar replicas=2
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from studio.errors import StudioError
from studio.ui.api.routes import new_application
from studio.ui.server.forwarding import Forwarder, ReplicaLost, answered
from studio.ui.server.keys import Keys, read_keys
from studio.ui.server.limits import Limits, set_limits
from studio.ui.server.logs import RequestLog, use_json_lines
from studio.ui.server.middleware import ASGIApp, GuardMiddleware, Message, Receive, Send
from studio.ui.server.models import Device
from studio.ui.server.options import CONNECTIONS, named_sources, prepare_replica
from studio.ui.server.rate_limits import RateLimiter, Rates
from studio.ui.server.run import address_of, announce, open_socket, until_stopped
from studio.ui.server.scheduler import Overloaded, QueueLimits
from studio.ui.server.session import Listeners
from studio.ui.server.worker import use_workers

_MOST_OPEN = 10_000  # requests at the entry
_AHEAD = 2  # requests at a replica for each place in its batch, so that the batch stays full
_HEALTH = 10  # seconds between two questions whether a replica is well
_NAME = "studio"  # of the application
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
_RETRY = 2  # seconds after which a place may be free
_LOST = (
    RayActorError, WorkerCrashedError, ObjectLostError, RaySystemError, ReplicaUnavailableError,
    DeploymentUnavailableError,
)  # fmt: skip


class ClusterSettings(BaseModel):
    """What `studio serve --ray`, `serve run` and a configuration of Ray Serve may set; see `studio serve --help`."""

    model_config = ConfigDict(extra="forbid")

    models: str = Field("emoji-ar", description="Names, folders or Hub ids with commas; each has replicas of its own.")
    replicas: int | Literal["auto"] = Field(1, description='Of each model; "auto": as many as there is work for.')
    max_replicas: int = Field(100, ge=1, description='Of each model, at most, with "auto".')
    gpus: float | None = Field(None, ge=0, description="Of each replica; 1 where the cluster has any, else 0.")
    dtype: str | None = None
    max_waiting: int = Field(64, ge=1, description="Requests that wait for a model, at most.")
    max_per_user: int = Field(4, ge=1, description="Waiting requests of one client at a replica, at most.")
    max_batch: int = Field(8, ge=1, le=1024)
    batching: Literal["continuous", "equal"] = "continuous"
    max_images: int = Field(4, ge=1, le=16)
    max_prompt: int = Field(500, ge=1, le=2000)
    max_answer: int = Field(256, ge=64)
    max_upload: int = Field(10, ge=1, le=1024)
    max_pixels: int = Field(16, ge=1, le=64)
    max_requests_per_minute: int | None = Field(None, ge=1)
    max_images_per_minute: int | None = Field(None, ge=1)
    api_keys: Path | None = Field(None, description="A file with a client's name and its key in each line.")
    allow_origin: list[str] = []
    drain_seconds: float = Field(10, ge=0)

    @property
    def limits(self) -> Limits:
        """Those of a request."""
        return Limits(self.max_images, self.max_prompt, self.max_pixels * 1_000_000, self.max_answer)

    @property
    def places(self) -> int:
        """Requests at a replica, at most."""
        return _AHEAD * self.max_batch


def application(settings: ClusterSettings, keys: Keys | None = None) -> serve.Application:
    """The application for `serve run`.

    Args:
        settings: of all its parts.
        keys: of the clients; `None` reads those of `settings` and of the variable `STUDIO_API_KEY`.

    Raises:
        StudioError: keys that cannot be read.
    """
    keys = keys or read_keys(os.environ.get("STUDIO_API_KEY", "").split(), settings.api_keys)
    resources = _resources(settings)
    sources = named_sources(settings.models.split(","))
    limits = settings.limits
    how: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.replicas == "auto":
        scale = {"min_replicas": 1, "max_replicas": settings.max_replicas}
        how = {"autoscaling_config": {**scale, "target_ongoing_requests": settings.max_batch}}
    replicas = {
        name: serve.deployment(Replica)
        .options(
            name=re.sub(r"[^\w.-]", "-", name),
            max_ongoing_requests=settings.places,
            max_queued_requests=settings.max_waiting,
            graceful_shutdown_timeout_s=settings.drain_seconds,
            health_check_period_s=_HEALTH,
            ray_actor_options=resources,
            logging_config={"enable_access_log": False},
            **how,
        )
        .bind(name, source, Device(None if resources["num_gpus"] else "cpu", settings.dtype), settings)
        for name, source in sources.items()
    }
    entry = serve.deployment(Entry).options(
        name="entry",
        max_ongoing_requests=_MOST_OPEN,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return entry.bind(settings, keys, replace(limits, models=sources), replicas)


def serve_cluster(host: str, port: int, settings: ClusterSettings, keys: Keys | None) -> None:
    """Serve the application until SIGINT or SIGTERM; a second one ends the process at once.

    It runs on the cluster of the variable `RAY_ADDRESS`, or on one that is started on this machine.

    Args:
        host, port: where to listen; port 0 takes any that is free.
        settings, keys: as of `application`.

    Raises:
        StudioError: nothing can listen there, the machine has too little, or no replica starts.
    """
    with open_socket(host, port) as found:
        port = found.getsockname()[1]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_own = "RAY_ADDRESS" not in os.environ
    ray.init(address="local" if is_own else None, logging_level="warning", runtime_env={"env_vars": _QUIET})
    try:
        if is_own:
            _check_room(settings)
        with until_stopped() as wait:
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            try:
                serve.run(application(settings, keys), name=_NAME, route_prefix="/")
            except RuntimeError as error:
                raise StudioError(f"The replicas do not start; the lines above say why: {error}") from error
            announce(f"The API is at {address_of(host, port)}v1")
            wait()
            announce(f"Stopping: work under way has {settings.drain_seconds:g} seconds. Press Ctrl+C to stop at once.")
            serve.delete(_NAME)
        announce("Stopped.")
    finally:
        ray.shutdown()


def _check_room(settings: ClusterSettings) -> None:
    """Check that a cluster that cannot grow has room for all replicas, for which Ray would wait for ever.

    Raises:
        StudioError: it has not.
    """
    there, each = ray.cluster_resources(), _resources(settings)
    kinds = {"num_cpus": "CPU", "num_gpus": "GPU"}
    most = min(int(there.get(kinds[name], 0) // count) for name, count in each.items() if count)
    models = len(settings.models.split(","))
    wanted = models * (1 if settings.replicas == "auto" else settings.replicas)
    if wanted > most:
        raise StudioError(
            f"This machine has room for {most} replicas, not {wanted}: ask for fewer, or start a cluster."
        )


def _resources(settings: ClusterSettings) -> dict[str, float]:
    """What Ray keeps for a replica."""
    gpus = settings.gpus
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
    return {"num_cpus": 1, "num_gpus": gpus}


class Replica:
    """One model on one device, in a process of its own.

    Args:
        name, source: as of `prepare_replica`.
        device: where it runs.
        settings: of the application.

    Raises:
        StudioError: the model cannot be loaded.
    """

    def __init__(self, name: str, source: str, device: Device, settings: ClusterSettings) -> None:
        use_json_lines()
        queue = QueueLimits(
            settings.places, settings.max_per_user, settings.max_batch, settings.batching == "continuous"
        )
        prepare_replica(name, source, device, queue, settings.limits)
        self._app, self._device = new_application(None), device

    async def answer(self, asked: dict[str, Any], body: bytes) -> AsyncGenerator[Any]:
        """As of `answered`."""
        async for message in answered(self._app, asked, body):
            yield message

    async def check_health(self) -> None:
        """Ray Serve replaces a replica where this fails three times: a GPU that once failed fails from then on."""
        import torch

        await asyncio.to_thread(lambda: torch.ones(1, device=self._device.name or _any_device()).item())


@serve.ingress()
class Entry:
    """The API without a model, and what all clients pass.

    Args:
        settings: of the application.
        keys: of the clients, or `None`.
        limits: of a request, with the models by name.
        replicas: the handle of each model.
    """

    def __init__(self, settings: ClusterSettings, keys: Keys | None, limits: Limits, replicas: dict[str, Any]) -> None:
        use_json_lines()
        set_limits(limits)
        use_workers([])
        rates = RateLimiter(
            Rates(settings.max_requests_per_minute or float("inf"), settings.max_images_per_minute or float("inf"))
        )
        asks = {name: partial(_ask, handle, settings.max_waiting) for name, handle in replicas.items()}
        guarded = GuardMiddleware(
            Forwarder(new_application(None), asks, rates),
            Listeners(),
            settings.max_upload * 1_000_000,
            CONNECTIONS * settings.max_per_user,
            keys,
            settings.allow_origin,
        )
        self._app = _without_id(RequestLog(guarded))

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def _without_id(app: ASGIApp) -> ASGIApp:
    """An application whose answers leave `X-Request-ID` to Ray Serve, which sends it anyway."""

    async def named(scope: Message, receive: Receive, send: Send) -> None:
        async def unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, unnamed)

    return named


async def _ask(handle: Any, most: int, asked: dict[str, Any], body: bytes) -> AsyncGenerator[Any]:
    """Ask a replica of a deployment.

    Raises:
        Overloaded: `most` requests wait already.
        ReplicaLost: it ended before its answer did.
    """
    answer = handle.options(stream=True).answer.remote(asked, body)
    try:
        async for message in answer:
            yield message
    except BackPressureError as error:
        full = f"All {most} places in the queue are taken: try again in a moment."
        raise Overloaded(full, 503, _RETRY) from error
    except _LOST as error:
        raise ReplicaLost from error
    finally:
        answer.cancel()


def _any_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
