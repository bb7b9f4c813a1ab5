"""`studio models`, `studio doctor` and `studio ui`."""

import time
from typing import Annotated

import typer

from studio.commands.options import Device, Json
from studio.console import emit, quiet_libraries, say
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


def doctor(
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run every bundled pipeline and decoding once and compare it with PyTorch on the CPU."
        ),
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Check this installation: device, versions, bundled weights with their SHA-256."""
    from studio.doctor import examine

    if device is not None and not check:
        raise StudioError("--device says where --check runs: add --check, or leave --device out.")
    report = examine()
    if check and report["ok"]:
        _check(report, device)
        return
    emit(report)
    _say_report(report)
    if not report["ok"]:
        raise StudioError("Some bundled weights are missing or damaged: install Studio again.")


def _say_report(report: dict) -> None:
    found = {"device": "device", "threads": "threads", "compiled step": "compiled_step"}
    for name, value in {**report["versions"], **{name: report[key] for name, key in found.items()}}.items():
        say(f"{name:24} {value}")
    for row in report["models"]:
        say(f"{row['name']:24} {row['state']}")
        for file, checksum in row["sha256"].items():
            if file.endswith(".safetensors"):
                say(f"  {checksum}  {file}")


def _check(report: dict, device: str | None) -> None:
    """Runs the checks; the exit code is 1 where one fails."""
    from studio.bench.self_check import as_row, self_check, summary
    from studio.checkpoints.loading import pick_device

    quiet_libraries()
    began, checks, where = time.perf_counter(), [], str(pick_device(device))
    for check in self_check(device):
        checks.append(check)
        measures = [f"error {check.error:.2g}"] if check.error is not None else []
        measures += [f"{check.agreement:.0%} agree"] if check.agreement is not None else []
        outcome = "ok" if check.problem is None else f"FAILED: {check.problem}"
        name = f"{check.model:14} {check.part:14} {check.dtype:9} {check.backend:7}"
        say(f"{name} {check.seconds:7.3f} s {check.memory_mb:6.0f} MiB  {', '.join(measures):12} {outcome}")
    failed = any(check.problem is not None for check in checks)
    line = summary(checks, where, time.perf_counter() - began)
    emit({**report, "ok": not failed, "checks": [as_row(check) for check in checks], "summary": line})
    say(line)
    if failed:
        raise typer.Exit(1)


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
