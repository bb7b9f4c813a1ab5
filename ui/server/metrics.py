"""Numbers of this process for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from studio.ui.server import worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ENDPOINTS = ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/models")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_registry = CollectorRegistry()
_requests = Counter("studio_requests", "Answered requests.", ["endpoint", "status"], registry=_registry)
_latency = Histogram(
    "studio_request_seconds", "Seconds of a request.", ["endpoint"], buckets=_SECONDS, registry=_registry
)
_images = Counter("studio_images", "Finished images.", ["model"], registry=_registry)
_tokens = Counter("studio_image_tokens", "Tokens of finished images.", ["model"], registry=_registry)
_batch = Histogram("studio_batch_images", "Images in a call of a model.", buckets=_SIZES, registry=_registry)
_phases = Counter("studio_phase_seconds", "Seconds of devices by phase.", ["phase"], registry=_registry)
_errors = Counter("studio_errors", "Requests that failed, by kind.", ["kind"], registry=_registry)
_retries = Counter("studio_retries", "Requests asked again after their replica was lost.", registry=_registry)
_waiting = Gauge("studio_waiting_images", "Images that wait for a device.", registry=_registry)
_running = Gauge("studio_running_images", "Images that are being sampled.", registry=_registry)
_waiting.set_function(lambda: sum(each.waiting for each in worker.workers()))
_running.set_function(lambda: sum(each.running for each in worker.workers()))


def exposed() -> bytes:
    """All numbers in the text format of Prometheus."""
    return generate_latest(_registry)


def count_request(path: str, status: int, seconds: float) -> None:
    """Count an answered request: `status` of HTTP, 0 where the client left."""
    endpoint = path if path in _ENDPOINTS else "other"
    _requests.labels(endpoint, str(status)).inc()
    _latency.labels(endpoint).observe(seconds)


def count_error(kind: str) -> None:
    """Count a request that failed: the type of its error, or "refused"."""
    _errors.labels(kind).inc()


def count_retry() -> None:
    """Count a request that is asked again because its replica was lost."""
    _retries.inc()


def count_images(model: str, images: int, tokens: int) -> None:
    """Count finished images of a request."""
    _images.labels(model).inc(images)
    _tokens.labels(model).inc(tokens)


def count_call(images: int) -> None:
    """Count a call of a model for so many images."""
    _batch.observe(images)


def count_seconds(seconds: dict[str, float]) -> None:
    """Count seconds of a device by phase."""
    for phase, count in seconds.items():
        if phase != "total":
            _phases.labels(phase).inc(count)
