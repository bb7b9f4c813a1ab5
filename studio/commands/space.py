"""`studio space`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from studio.commands.options import Json
from studio.commands.push import DryRun, Private, check_repo_id, readable_size, report, upload
from studio.console import emit, say
from studio.space import build_space

Model = Annotated[str, typer.Option(help="What it samples with: a bundled name, a model folder or a Hub id.")]
Title = Annotated[str, typer.Option(help="What the Space is called.")]


def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make, empty or new.")],
    model: Model = "emoji-ar",
    title: Title = "Studio",
    as_json: Json = False,
) -> None:
    """Write a Hugging Face Space: the app with all that it needs."""
    files = build_space(folder, model=model, title=title)
    emit({"path": str(folder), "files": len(files), "bytes": sum(files.values())})
    say(f"{folder}  {len(files)} files, {readable_size(sum(files.values()))}")
    say(f"Try it: cd {folder} && pip install -r requirements.txt && python app.py")


def push(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The Space, as owner/name.")],
    model: Model = "emoji-ar",
    title: Title = "Studio",
    private: Private = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Build a Space and upload it to the Hugging Face Hub, with the token of `hf auth login`."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space"
        files, url = build_space(folder, model=model, title=title), None
        if not dry_run:
            delete = ["studio/**"]  # what an earlier version had and this one has not
            url = upload(folder, repo_id, private=private, delete=delete, repo_type="space", space_sdk="gradio")
    report(repo_id, files, url)
