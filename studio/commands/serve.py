"""`studio serve` and `studio bench serve`."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from studio.checks import shown
from studio.commands.options import Device, Json
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the app to the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any that is free.")] = 7860,
    model: Annotated[str, typer.Option(help="The model: a bundled name, a folder or a Hub id.")] = "emoji-ar",
    devices: Annotated[
        str | None,
        typer.Option(help="Devices separated by commas, such as cuda:0,cuda:1; each has the model and a queue.",
                     show_default="cuda if there is one"),
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
    keys, origins = read_keys(api_key or [], api_keys), allow_origin or []
    if wrong := next((each for each in origins if not re.fullmatch(r"https?://[^/\s]+", each)), None):
        raise StudioError(f"An origin is a scheme and a host, such as https://example.org, not {shown(wrong)}.")
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


def bench_serve(
    model: Annotated[str, typer.Option(help="The model: a bundled name or a folder.")] = "emoji-ar",
    clients: Annotated[int, typer.Option(min=1, max=1000, help="Clients that send requests at the same time.")] = 50,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client, one after the other.")] = 2,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="As of studio serve.")] = 8,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Settings and numbers of images differ, and some requests are given up.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Send requests of many clients to a server on this machine, and compare each image with that of a single call.

    The reference is the same server with --batching equal.
    """
    from studio.bench.report import records_table
    from studio.bench.serve import bench_serve as measure

    quiet_libraries()
    result = measure(model, clients=clients, requests=requests, max_batch=max_batch, mixed=mixed, device=device)
    emit(result)
    say(records_table([{"figure": name, "value": value} for name, value in result.items()]))
