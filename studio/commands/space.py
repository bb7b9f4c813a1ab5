"""`studio space`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from studio.commands.options import Json
from studio.console import emit, say
from studio.errors import StudioError
from studio.space import build_space

Model = Annotated[str, typer.Option(help="What it draws with: a bundled name, a model folder or a Hub id.")]
Title = Annotated[str, typer.Option(help="What the Space is called.")]


def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make, empty or new.")],
    model: Model = "emoji-ar",
    title: Title = "Studio",
    as_json: Json = False,
):
    """Write a Hugging Face Space: the app with all that it needs."""
    files = build_space(folder, model=model, title=title)
    emit({"path": str(folder), "files": len(files), "bytes": sum(files.values())})
    say(f"{folder}  {len(files)} files, {_size(sum(files.values()))}")
    say(f"Try it: cd {folder} && pip install -r requirements.txt && python app.py")


def push(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The Space, as owner/name.")],
    model: Model = "emoji-ar",
    title: Title = "Studio",
    private: Annotated[bool, typer.Option("--private", help="Make a new Space private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the files and their sizes; needs no network.")
    ] = False,
    as_json: Json = False,
):
    """Build a Space and upload it to the Hugging Face Hub, with the token of `hf auth login`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise StudioError(f"{repo_id!r} is no name for a Space: write owner/name.") from error
    if repo_id.count("/") != 1:
        raise StudioError(f"{repo_id!r} is no name for a Space: write owner/name.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space"
        files = build_space(folder, model=model, title=title)
        url = None if dry_run else _upload(folder, repo_id, private)
    emit(
        {
            "repo_id": repo_id,
            "url": url,
            "files": [{"path": path, "bytes": size} for path, size in files.items()],
            "bytes": sum(files.values()),
        }
    )
    if dry_run:
        for path, size in files.items():
            say(f"{_size(size):>10}  {path}")
    say(f"{len(files)} files, {_size(sum(files.values()))}" + (f": {url}" if url else "; nothing was uploaded"))


def _upload(folder, repo_id, private):
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=folder,
            delete_patterns=["studio/**"],  # what an earlier version had and this one has not
            commit_message="Studio",
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise StudioError(f"{repo_id} could not be uploaded ({reason}): check `hf auth whoami`.") from error
    return str(url)


def _size(size):
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
