"""`studio push`, and the upload that `studio space push` shares."""

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.checkpoints.bundled import folder_of_model
from studio.checks import shown
from studio.commands.options import Json
from studio.console import emit, say
from studio.errors import StudioError

Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes without uploading.")]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained or converted model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository, as owner/name.")],
    private: Private = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Upload a model folder to the Hugging Face Hub with the token of `hf auth login`."""
    check_repo_id(repo_id)
    folder = folder_of_model(folder)
    if not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise StudioError(f"{folder} holds no model: give the folder that training or convert wrote.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    report(repo_id, files, None if dry_run else upload(folder, repo_id, private=private))


def check_repo_id(repo_id: str) -> None:
    """Check the id of a repository.

    Raises:
        StudioError: it is not of the form `owner/name`.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise StudioError(f"{shown(repo_id)} is no name on the Hub: write owner/name.")


def upload(folder: Path, repo_id: str, *, private: bool, delete: list[str] | None = None, **repository: Any) -> str:
    """Upload a folder.

    Args:
        folder: what is uploaded.
        repo_id: where; made if it is not there.
        private: whether a new repository is private.
        delete: patterns of files to delete that are no longer in the folder.
        repository: `repo_type` and what else `create_repo` takes.

    Returns:
        The URL of the repository.

    Raises:
        StudioError: it could not be uploaded.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True, **repository)
        kind = repository.get("repo_type")
        api.upload_folder(
            repo_id=repo_id, repo_type=kind, folder_path=folder, delete_patterns=delete, commit_message="Studio"
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise StudioError(f"{repo_id} could not be uploaded ({reason}): check `hf auth whoami`.") from error
    return str(url)


def report(repo_id: str, files: dict[str, int], url: str | None) -> None:
    """Print what was uploaded, or, without a URL, what would be uploaded."""
    listed = [{"path": path, "bytes": size} for path, size in files.items()]
    emit({"repo_id": repo_id, "url": url, "files": listed, "bytes": sum(files.values())})
    if url is None:
        for path, size in files.items():
            say(f"{readable_size(size):>10}  {path}")
    total = f"{len(files)} files, {readable_size(sum(files.values()))}"
    say(f"{total}: {url}" if url else f"{total}; nothing was uploaded")


def readable_size(size: int) -> str:
    """A number of bytes in kB or MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
