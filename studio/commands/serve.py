"""`studio serve` and `studio bench serve`."""

from typing import Annotated

import typer

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
    max_images: Annotated[int, typer.Option(min=1, max=16, help="Images of one request, at most.")] = 4,
    max_prompt: Annotated[int, typer.Option(min=1, max=2000, help="Characters of a text, at most.")] = 500,
    max_answer: Annotated[int, typer.Option(min=64, help="Tokens of an answer, at most.")] = 256,
    max_upload: Annotated[int, typer.Option(min=1, max=1024, help="Megabytes of an upload, at most.")] = 10,
    max_pixels: Annotated[int, typer.Option(min=1, max=64, help="Million pixels of an uploaded image, at most.")] = 16,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that work may go on after SIGINT or SIGTERM.")
    ] = 10,
) -> None:  # fmt: skip
    """Serve the app to many people: a fair queue for each device, compatible requests in batches, within limits."""
    if max_images > max_batch:
        raise StudioError(f"--max-batch {max_batch} cannot hold --max-images {max_images}: raise the former.")
    from studio.ui.server.storage import use_private_folder

    folder = use_private_folder()  # before Gradio is imported

    from studio.ui.server.limits import Limits
    from studio.ui.server.options import devices_of
    from studio.ui.server.options import serve as serve_app
    from studio.ui.server.scheduler import QueueLimits

    quiet_libraries()
    serve_app(
        host,
        port,
        model=model,
        devices=devices_of(devices, dtype),
        queue_limits=QueueLimits(max_waiting, max_per_user, max_batch),
        limits=Limits(max_images, max_prompt, max_pixels * 1_000_000, max_answer),
        upload_bytes=max_upload * 1_000_000,
        drain_seconds=drain_seconds,
        folder=folder,
    )


def bench_serve(
    model: Annotated[str, typer.Option(help="The model: a bundled name or a folder.")] = "emoji-ar",
    clients: Annotated[int, typer.Option(min=1, max=1000, help="Clients that send requests at the same time.")] = 50,
    requests: Annotated[int, typer.Option(min=1, help="Images that each client asks for, one by one.")] = 2,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="As of studio serve.")] = 8,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Send requests of many clients to a server on this machine, and compare each image with that of a single call."""
    from studio.bench.report import records_table
    from studio.bench.serve import bench_serve as measure

    quiet_libraries()
    result = measure(model, clients=clients, requests=requests, max_batch=max_batch, device=device)
    emit(result)
    say(records_table([{"figure": name, "value": value} for name, value in result.items()]))
