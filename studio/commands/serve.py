"""`studio serve` and `studio bench serve`."""

from typing import Annotated

import typer

from studio.commands.options import Device, Json
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 shows the app to the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any that is free.")] = 7860,
    model: Annotated[str, typer.Option(help="What samples: a bundled name, a model folder or a Hub id.")] = "emoji-ar",
    devices: Annotated[
        str | None,
        typer.Option(help="Devices with commas between, such as cuda:0,cuda:1; each has the model and a queue.",
                     show_default="cuda if there is one"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; in float32 an image does not depend on who else samples.",
                     show_default="by device"),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, max=10_000, help="Requests that may wait for each device.")] = 64,
    max_per_user: Annotated[int, typer.Option(min=1, help="Those of one client (an address) among them.")] = 4,
    max_batch: Annotated[
        int, typer.Option(min=1, max=1024, help="Images of equal requests that are sampled in one call.")
    ] = 8,
    max_images: Annotated[int, typer.Option(min=1, max=16, help="Images of one request.")] = 4,
    max_prompt: Annotated[int, typer.Option(min=1, max=2000, help="Characters of a prompt or a question.")] = 500,
    max_answer: Annotated[int, typer.Option(min=64, help="Tokens of an answer to a question.")] = 256,
    max_upload: Annotated[int, typer.Option(min=1, max=1024, help="Megabytes of a file that is given.")] = 10,
    max_pixels: Annotated[int, typer.Option(min=1, max=64, help="Million pixels of an image that is given.")] = 16,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="How long work may go on after SIGINT or SIGTERM.")
    ] = 10,
):  # fmt: skip
    """Serve the app to many people: a queue per device, in turns, equal requests sampled together, within limits."""
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
    model: Annotated[str, typer.Option(help="What samples: a bundled name or a model folder.")] = "emoji-ar",
    clients: Annotated[int, typer.Option(min=1, max=1000, help="Programs that ask at the same time.")] = 50,
    requests: Annotated[int, typer.Option(min=1, help="Images that each asks for, one after the other.")] = 2,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="As of studio serve.")] = 8,
    device: Device = None,
    as_json: Json = False,
):
    """Ask a server on this machine for images from many sides, and check each against a call of its own."""
    from studio.bench.report import records_table
    from studio.bench.serve import bench_serve as measure

    quiet_libraries()
    result = measure(model, clients=clients, requests=requests, max_batch=max_batch, device=device)
    emit(result)
    say(records_table([{"figure": name, "value": value} for name, value in result.items()]))
