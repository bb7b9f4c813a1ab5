"""`studio serve` and `studio bench serve`."""

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from studio.checks import shown
from studio.commands.options import Device, Json, number
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError

_MOST_REPLICAS = 1000


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the app to the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any that is free.")] = 7860,
    model: Annotated[
        str, typer.Option(help="The model: a bundled name, a folder or a Hub id; with --ray several with commas.")
    ] = "emoji-ar",
    devices: Annotated[
        str | None,
        typer.Option(help="Devices separated by commas, such as cuda:0,cuda:1; each has the model and a queue. With "
                          "--ray cpu or cuda.",
                     show_default="cuda if there is one"),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve the API with Ray Serve, on this machine or the cluster of RAY_ADDRESS.")
    ] = False,
    replicas: Annotated[
        str | None,
        typer.Option(help="With --ray: processes of each model, or auto for as many as there is work for.",
                     show_default="1"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; in float32 images do not depend on the batch.",
                     show_default="by device"),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, max=10_000, help="Waiting requests of each device, at most.")] = 64,
    max_per_user: Annotated[int, typer.Option(min=1, help="Waiting requests of one client (an address), at most.")] = 4,
    max_batch: Annotated[
        int, typer.Option(min=1, max=1024, help="Images of compatible requests in one call, at most.")
    ] = 8,
    batching: Annotated[
        Literal["continuous", "equal"],
        typer.Option(help="Requests join and leave a running batch, or only equal ones share a call from its start."),
    ] = "continuous",
    max_images: Annotated[int, typer.Option(min=1, max=16, help="Images of one request, at most.")] = 4,
    max_prompt: Annotated[int, typer.Option(min=1, max=2000, help="Characters of a text, at most.")] = 500,
    max_answer: Annotated[int, typer.Option(min=64, help="Tokens of an answer, at most.")] = 256,
    max_upload: Annotated[int, typer.Option(min=1, max=1024, help="Megabytes of an upload, at most.")] = 10,
    max_pixels: Annotated[int, typer.Option(min=1, max=64, help="Million pixels of an uploaded image, at most.")] = 16,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="STUDIO_API_KEY", help="A key that clients must send; may be given several times.",
                     show_default="no key is needed"),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with a client's name and its key in each line.", show_default=False)
    ] = None,
    max_requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests of one key, or address, in a minute.", show_default="no limit")
    ] = None,
    max_images_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Images of one key, or address, in a minute.", show_default="no limit")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Another site whose pages may use the API, such as https://example.org; may be repeated.",
                     show_default="none"),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that work may go on after SIGINT or SIGTERM.")
    ] = 10,
) -> None:  # fmt: skip
    """Serve the app and OpenAI's API to many: a fair queue for each device, requests in batches, within limits."""
    if max_images > max_batch:
        raise StudioError(f"--max-batch {max_batch} cannot hold --max-images {max_images}: raise the former.")
    origins = allow_origin or []
    if wrong := next((each for each in origins if not re.fullmatch(r"https?://[^/\s]+", each)), None):
        raise StudioError(f"An origin is a scheme and a host, such as https://example.org, not {shown(wrong)}.")
    if ray or replicas is not None:
        limited: dict[str, Any] = {"max_waiting": max_waiting, "max_per_user": max_per_user, "max_batch": max_batch}
        limited |= {"max_images": max_images, "max_prompt": max_prompt, "max_answer": max_answer}
        limited |= {"max_upload": max_upload, "max_pixels": max_pixels, "drain_seconds": drain_seconds}
        limited |= {
            "max_requests_per_minute": max_requests_per_minute, "max_images_per_minute": max_images_per_minute
        }  # fmt: skip
        how = {"models": model, "dtype": dtype, "batching": batching, "allow_origin": origins, **limited}
        _serve_on_ray(host, port, ray, replicas, devices, how, api_key or [], api_keys)
        return
    from studio.ui.server.storage import use_private_folder

    folder = use_private_folder()  # before Gradio is imported

    from studio.ui.server.keys import read_keys
    from studio.ui.server.limits import Limits
    from studio.ui.server.logs import use_json_lines
    from studio.ui.server.options import devices_of
    from studio.ui.server.options import serve as serve_app
    from studio.ui.server.rate_limits import Rates
    from studio.ui.server.scheduler import QueueLimits

    quiet_libraries()
    keys = read_keys(api_key or [], api_keys)
    use_json_lines()
    serve_app(
        host,
        port,
        model=model,
        devices=devices_of(devices, dtype),
        queue_limits=QueueLimits(max_waiting, max_per_user, max_batch, batching == "continuous"),
        limits=Limits(max_images, max_prompt, max_pixels * 1_000_000, max_answer),
        upload_bytes=max_upload * 1_000_000,
        rates=Rates(max_requests_per_minute or math.inf, max_images_per_minute or math.inf),
        keys=keys,
        origins=origins,
        drain_seconds=drain_seconds,
        folder=folder,
    )


def _serve_on_ray(
    host: str, port: int, ray: bool, replicas: str | None, devices: str | None, how: dict[str, Any], given: list[str],
    file: Path | None,
) -> None:  # fmt: skip
    replicas = replicas or "1"
    if not ray:
        raise StudioError("--replicas is for --ray: give both, or --devices for several devices of this machine.")
    if replicas != "auto" and not (replicas.isdecimal() and 0 < int(replicas[:6]) <= _MOST_REPLICAS):
        raise StudioError(f"--replicas is a number from 1 to {_MOST_REPLICAS}, or auto, not {shown(replicas)}.")
    if devices not in (None, "cpu", "cuda"):
        raise StudioError(f"With --ray, --devices is cpu or cuda, not {shown(devices)}: Ray chooses the device.")
    if find_spec("ray") is None:
        raise StudioError('--ray needs Ray Serve: pip install "token-studio[ray]".')
    from studio.ui.server.cluster import ClusterSettings, serve_cluster
    from studio.ui.server.keys import read_keys

    gpus = {None: None, "cpu": 0.0, "cuda": 1.0}[devices]
    settings = ClusterSettings.model_validate({"replicas": replicas, "gpus": gpus, **how})
    serve_cluster(host, port, settings, read_keys(given, file))


def bench_serve(
    model: Annotated[str, typer.Option(help="The model: a bundled name or a folder.")] = "emoji-ar",
    clients: Annotated[int, typer.Option(min=1, max=1000, help="Clients that send requests at the same time.")] = 50,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each client, one after the other.", show_default="2")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="As of studio serve.")] = 8,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Settings and numbers of images differ, and some requests are given up.")
    ] = False,
    soak_minutes: Annotated[
        float | None,
        number(help="Instead: mixed generations, edits and questions for so long, and the server's memory.", min=0.01),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=2, max=64, help="Instead: so many replicas of Ray Serve, one of which is killed under load.",
                     show_default=False),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Send requests of many clients to a server on this machine, and compare each answer with that of a single call.

    The reference is the same server with --batching equal.
    """
    if soak_minutes is not None and (replicas or mixed or requests):
        raise StudioError("A soak is mixed and lasts minutes: leave out --replicas, --mixed and --requests.")
    if replicas is not None and mixed:
        raise StudioError("Requests to replicas are mixed anyway: leave out --mixed.")
    from studio.bench.report import records_table

    quiet_libraries()
    shared: dict[str, Any] = {"clients": clients, "max_batch": max_batch, "device": device}
    if soak_minutes is not None:
        from studio.bench.soak import bench_soak

        result = bench_soak(model, minutes=soak_minutes, **shared)
    elif replicas is not None:
        from studio.bench.replicas import bench_replicas

        result = bench_replicas(model, replicas=replicas, requests=requests or 2, **shared)
    else:
        from studio.bench.serve import bench_serve as measure

        result = measure(model, requests=requests or 2, mixed=mixed, **shared)
    emit(result)
    say(records_table([{"figure": name, "value": value} for name, value in result.items()]))
