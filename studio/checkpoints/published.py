"""Published weights by name: where the authors put them, under which licence, and how they become a folder of ours.

A name is downloaded, converted and kept in the cache folder at its first use: `studio pull llamagen-b-256`,
`studio.load("llamagen-b-256")` or `--model llamagen-b-256`. Downloads go through huggingface_hub: a broken
connection is resumed, a pull that was stopped goes on with the files that are missing; `HF_HOME`, `HF_TOKEN` and
`HF_ENDPOINT` are followed.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studio.checkpoints.bundled import sha256
from studio.checks import shown
from studio.errors import StudioError
from studio.files import cache_folder

PULLED_FILE = "pulled.json"
"""In a pulled model's folder: where it came from."""
SPACE = 2.2
"""Free disk space that a pull needs, over the size of the files: these, and what they are converted to."""


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        summary: what it is, in a line.
        licence: its name.
        files: (repository, file) on the Hub; a repository alone, with "" as file, is its whole folder.
        convert: called with the paths of those and the folder to make.
        page: where the authors describe it.
        by_hand: for weights that are not on the Hub, the command that converts a file downloaded from the page.
        is_commercial: whether the licence allows commercial use.
    """

    summary: str
    licence: str
    files: tuple[tuple[str, str], ...] = ()
    convert: Callable[[list[Path], Path], object] | None = None
    page: str = ""
    by_hand: str = ""
    is_commercial: bool = True


def _llamagen_vq(paths, out):
    from studio.checkpoints.llamagen import convert_llamagen_vq

    return convert_llamagen_vq(paths[0], out)


def _llamagen(kind, grid_size):
    def convert(paths, out):
        from studio.checkpoints.llamagen import convert_llamagen

        words = {"text_encoder": paths[2]} if kind == "t2i" else {}
        return convert_llamagen(paths[0], out, kind, tokenizer=paths[1], grid_size=grid_size, **words)

    return convert


def _one_d_piece(paths, out):
    from studio.checkpoints.one_d_piece import convert_one_d_piece

    return convert_one_d_piece(paths[0], out)


_LLAMAGEN, _T2I = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
_MIT = "MIT (majority of the code; see the page)"
_LLAMAGEN_PAGE = "https://github.com/FoundationVision/LlamaGen"
_MAR_PAGE, _RQ_PAGE = "https://github.com/LTH14/mar", "https://github.com/kakaobrain/rq-vae-transformer"
_C2I = {f"{size.lower()}-{side}": f"{size}_{side}" for size, side in (
    ("B", 256), ("B", 384), ("L", 256), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384),
)}  # fmt: skip

PUBLISHED: dict[str, Published] = {
    **{
        f"llamagen-vq-{factor}": Published(
            f"LlamaGen's VQ tokenizer, {factor} pixels a token", _MIT, ((_LLAMAGEN, f"vq_ds{factor}_c2i.pt"),),
            _llamagen_vq, _LLAMAGEN_PAGE,
        )
        for factor in (16, 8)
    },
    **{
        f"llamagen-{name}": Published(
            f"LlamaGen {name.split('-')[0].upper()}, ImageNet classes, {name.split('-')[1]} px", _MIT,
            ((_LLAMAGEN, f"c2i_{file}.pt"), (_LLAMAGEN, "vq_ds16_c2i.pt")), _llamagen("c2i", int(file[-3:]) // 16),
            _LLAMAGEN_PAGE,
        )
        for name, file in _C2I.items()
    },
    **{
        f"llamagen-t2i-{size}": Published(
            f"LlamaGen XL, text to image, {size} px", f"{_MIT}; flan-t5-xl: Apache-2.0",
            ((_T2I, f"t2i_XL_stage{stage}_{size}.pt"), (_T2I, "vq_ds16_t2i.pt"), ("google/flan-t5-xl", "")),
            _llamagen("t2i", size // 16), _LLAMAGEN_PAGE,
        )
        for stage, size in ((1, 256), (2, 512))
    },
    **{
        f"one-d-piece-{size}": Published(
            f"One-D-Piece {size.upper()}, 256 px", "see the model card",
            ((f"turing-motors/One-D-Piece-{size.upper()}-256", ""),), _one_d_piece,
            f"https://huggingface.co/turing-motors/One-D-Piece-{size.upper()}-256",
        )
        for size in ("s", "b", "l")
    },
    **{
        f"mar-{size}": Published(
            f"MAR {size.upper()}, ImageNet classes, 256 px", "MIT", page=_MAR_PAGE,
            by_hand=f"studio convert mar checkpoint-last.pth mar-{size} --tokenizer kl16.ckpt",
        )
        for size in ("b", "l", "h")
    },
    "rq-imagenet": Published(
        "RQ-Transformer, ImageNet classes, 256 px", "code Apache-2.0, weights non-commercial", page=_RQ_PAGE,
        by_hand="studio convert rq-transformer TRANSFORMER.pt rq-imagenet --tokenizer RQVAE.pt", is_commercial=False,
    ),
    "token-bridge-l": Published(
        "TokenBridge L, ImageNet classes, 256 px", "see the page", page="https://github.com/YuqingWang1029/TokenBridge",
        by_hand="studio convert token-bridge checkpoint-last.pth token-bridge-l --tokenizer kl16.ckpt",
    ),
}  # fmt: skip


def pulled_folder(name: str) -> Path:
    """Where a published model is kept once it was pulled."""
    return cache_folder() / "models" / name


def is_pulled(name: str) -> bool:
    """Whether it is there, whole."""
    return (pulled_folder(name) / PULLED_FILE).is_file()


def pull(
    name: str,
    *,
    accept_licence: bool = False,
    delete_downloads: bool = False,
    on_plan: Callable[[dict], None] | None = None,
) -> Path:
    """Download a published model and convert it, unless that was done before.

    Args:
        name: one of `PUBLISHED`.
        accept_licence: needed for a licence that forbids commercial use.
        delete_downloads: whether the authors' files are deleted once they are converted.
        on_plan: called before anything is downloaded with `{"name", "summary", "licence", "bytes", "files", "folder"}`.

    Returns:
        The folder.

    Raises:
        StudioError: no such name, a licence that was not accepted, no network, a gated or missing file, too little disk
            space, or files that are not what their names say. What was downloaded stays for the next try.
    """
    if name not in PUBLISHED:
        raise StudioError(f"There is no published model {shown(name)}; there are {', '.join(PUBLISHED)}.")
    about, folder = PUBLISHED[name], pulled_folder(name)
    if is_pulled(name):
        return folder
    if not about.files or about.convert is None:
        raise StudioError(
            f"The weights of {name} are not on the Hub: download them from {about.page} and run `{about.by_hand}`."
        )
    if not about.is_commercial and not accept_licence:
        raise StudioError(f"The licence of {name} ({about.licence}) forbids commercial use: add --accept-licence.")
    plan = [_planned(repository, file) for repository, file in about.files]
    size = sum(part["bytes"] for part in plan)
    _check_space(folder, size)
    if on_plan is not None:
        files = [{key: part[key] for key in ("repository", "file", "revision", "bytes")} for part in plan]
        summary = {"name": name, "summary": about.summary, "licence": about.licence, "bytes": size, "files": files}
        on_plan({**summary, "folder": str(folder)})
    paths = [_downloaded(part) for part in plan]
    partial = folder.with_name(f".{name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # of a pull that was cut off
    try:
        about.convert(paths, partial)
        files = [
            {**{key: part[key] for key in ("repository", "file", "revision")}, "sha256": sha256(path)}
            for part, path in zip(plan, paths, strict=True)
            if path.is_file()
        ]
        record = {"name": name, "licence": about.licence, "page": about.page, "files": files}
        (partial / PULLED_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        raise StudioError(f"{name} cannot be kept in {folder.parent} ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if delete_downloads:
        for path in paths:
            _delete(path)
    return folder


def _planned(repository, file):
    """The revision and the size of a file, or of a folder's files."""
    from huggingface_hub import HfApi

    def ask():
        info = HfApi().model_info(repository, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        if file and file not in sizes:
            raise StudioError(f"{repository} has no file {file} any more: look at https://huggingface.co/{repository}.")
        wanted = {file: sizes[file]} if file else {each: size for each, size in sizes.items() if _is_needed(each)}
        size = sum(wanted.values())
        return {"repository": repository, "file": file, "wanted": [*wanted], "revision": info.sha, "bytes": size}

    return _from_the_hub(repository, ask)


def _is_needed(file):
    """Whether a file of a whole folder is downloaded: weights once, as safetensors, and what describes them."""
    return file.endswith((".json", ".safetensors", ".model", ".txt")) and "/" not in file


def _downloaded(part):
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, revision = part["repository"], part["revision"]

    def fetch():
        if part["file"]:
            return Path(hf_hub_download(repository, part["file"], revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=part["wanted"]))

    return _from_the_hub(repository, fetch)


def _from_the_hub(repository, call):
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return call()
    except StudioError:
        raise
    except GatedRepoError as error:
        raise StudioError(
            f"{repository} asks for an agreement: accept it at https://huggingface.co/{repository}, then run "
            "`hf auth login`."
        ) from error
    except OfflineModeIsEnabled as error:
        raise StudioError(f"{repository} cannot be downloaded: HF_HUB_OFFLINE is set.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise StudioError(f"{repository} cannot be downloaded (status {status}): {hint}.") from error
    except (LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise StudioError(f"{repository} cannot be downloaded ({reason}): run the same command to go on.") from error
    except Exception as error:  # of the HTTP library, whose classes change with huggingface_hub
        raise StudioError(
            f"{repository} cannot be downloaded ({type(error).__name__}): run the same command to go on."
        ) from error


def _check_space(folder, size):
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < SPACE * size:
        raise StudioError(
            f"{folder.name} needs about {SPACE * size / 1e9:.1f} GB in {place}, where {free / 1e9:.1f} GB are free: "
            "make room, or set STUDIO_CACHE and HF_HOME to another disk."
        )


def _delete(path):
    """Deletes a downloaded file with the content that it links to, or a downloaded folder."""
    if path.is_dir():
        for each in path.rglob("*"):
            if each.is_file():
                _delete(each)
        return
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)
