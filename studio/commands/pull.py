"""`studio pull`."""

import sys
from typing import Annotated

import typer

from studio.commands.options import Json
from studio.commands.push import readable_size
from studio.console import emit, quiet_libraries, say


def pull(
    name: Annotated[str, typer.Argument(help="A published model; `studio models --published` lists them.")],
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept a licence that forbids commercial use.")
    ] = False,
    delete_downloads: Annotated[
        bool, typer.Option("--delete-downloads", help="Delete the authors' files once they are converted.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Download a published model and convert it: it is then a name like those of the bundled ones."""
    from studio.checkpoints.published import is_pulled
    from studio.checkpoints.published import pull as fetch

    quiet_libraries()
    was_there = is_pulled(name)
    folder = fetch(name, accept_licence=accept_licence, delete_downloads=delete_downloads, on_plan=show_plan)
    emit({"name": name, "folder": str(folder), "pulled": not was_there})
    say(f"{name}: {folder}" + (" (was there)" if was_there else ""))
    say(f"Use it: studio generate --model {name} ..." if not name.startswith(("llamagen-vq", "one-d-piece")) else
        f"Use it: studio tokenize IMAGE --tokenizer {name}")  # fmt: skip


def show_plan(plan: dict) -> None:
    """Say on stderr what is about to be downloaded."""
    sources = ", ".join(dict.fromkeys(part["repository"] for part in plan["files"]))
    lines = (
        f"{plan['name']}: {plan['summary']}", f"  licence   {plan['licence']}", f"  from      {sources}",
        f"  size      {readable_size(plan['bytes'])}", f"  to        {plan['folder']}",
    )  # fmt: skip
    print("\n".join(lines), file=sys.stderr, flush=True)
