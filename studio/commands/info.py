"""`studio models`, `studio doctor` and `studio ui`."""

from typing import Annotated

import typer

from studio.commands.options import Json
from studio.console import emit, say
from studio.errors import StudioError


def models(
    published: Annotated[
        bool, typer.Option("--published", help="List the published models that `studio pull` knows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the bundled models, or the published ones."""
    from studio.checkpoints.published import PUBLISHED, is_pulled
    from studio.doctor import list_models

    if published:
        rows = [
            {"name": name, "state": "pulled" if is_pulled(name) else "not pulled", "licence": about.licence,
             "summary": about.summary, "page": about.page}
            for name, about in PUBLISHED.items()
        ]  # fmt: skip
        emit({"models": rows})
        for row in rows:
            say(f"{row['name']:18} {row['state']:10} {row['summary']}; licence: {row['licence']}")
        return
    rows = list_models()
    emit({"models": rows})
    for row in rows:
        say(f"{row['name']:12} {row['kind']:10} {row['state']:10} {row['summary']}")


def doctor(as_json: Json = False) -> None:
    """Check this installation: device, versions, bundled weights with their SHA-256."""
    from studio.doctor import examine

    report = examine()
    emit(report)
    found = {"device": "device", "threads": "threads", "compiled step": "compiled_step"}
    for name, value in {**report["versions"], **{name: report[key] for name, key in found.items()}}.items():
        say(f"{name:24} {value}")
    for row in report["models"]:
        say(f"{row['name']:24} {row['state']}")
        for file, checksum in row["sha256"].items():
            if file.endswith(".safetensors"):
                say(f"  {checksum}  {file}")
    if not report["ok"]:
        raise StudioError("Some bundled weights are missing or damaged: install Studio again.")


def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the app to the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any that is free.")] = 7860,
) -> None:
    """Serve the app to its owner, and print its address."""
    from studio.ui.server.storage import use_private_folder

    folder = use_private_folder()  # before Gradio is imported

    from studio.ui.app import launch

    launch(host=host, port=port, folder=folder)
