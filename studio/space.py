"""A Hugging Face Space: a folder that holds the app, the package and the weights, and needs only its requirements."""

import json
import re
import shutil
import tomllib
from pathlib import Path

from studio.checkpoints.bundled import BUNDLED, bundled_folder, folder_of_model, read_checksums, unknown_name
from studio.errors import StudioError
from studio.files import new_folder, user_path

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
OUTSIDE = ("pipelines", "tokenizers", "ui")  # parts of the package that a checkout keeps beside it
PYTHON = "3.12"
MODEL_FOLDER = "model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.part", "*.zip", "bundled")
_README = """\
---
title: {quoted_title}
emoji: 🍎
colorFrom: red
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: apache-2.0
short_description: Text to image, token by token
models: [{models}]
---
# {title}

Generates images from prompts with token-based image models and shows each step.
Everything that `{model}` needs is in this Space{origin}. Run it anywhere:

```sh
pip install -r requirements.txt
python app.py
```
"""


def build_space(folder: str | Path, *, model: str = "emoji-ar", title: str = "Studio") -> dict[str, int]:
    """Write a Space.

    Args:
        folder: must be empty or not exist; it is complete when it has this name.
        model: what it samples with: a bundled name, a model folder (copied) or a Hub id (fetched when it is used).
        title: what the Space is called.

    Returns:
        `{path: bytes}` of all its files, paths relative to the folder.

    Raises:
        StudioError: the folder holds something or cannot be written, there is no such model, or this is no checkout.
    """
    folder = user_path(folder)
    model = str(folder_of_model(model)) if Path(model).expanduser().is_dir() else model
    kind = _kind(model)
    pins = requirements()
    with new_folder(folder) as temporary:
        _write(temporary, model, kind, title, pins)
    return files_of(folder)


def requirements() -> dict[str, str]:
    """What the project depends on, `{package: version}`, at the versions that are known to work together.

    Raises:
        StudioError: Studio was installed without its constraints.txt.
    """
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    except FileNotFoundError as error:
        raise StudioError("A Space is built from a checkout of Studio: get one, and run the command there.") from error
    pinned = {_normalized(name): (name, version) for name, version in lines}
    names = [_normalized(re.split(r"[^\w.-]", dependency, maxsplit=1)[0]) for dependency in project["dependencies"]]
    if missing := [name for name in names if name not in pinned]:
        raise StudioError(f"constraints.txt has no version of {', '.join(missing)}: run `make constraints`.")
    return dict(pinned[name] for name in names)


def _normalized(name: str) -> str:
    """The name of a package as PEP 503 compares it: `pip freeze` writes underscores where others write hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def files_of(folder: Path) -> dict[str, int]:
    """The files under a folder with their sizes, `{relative path: bytes}`, in order."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _kind(model):
    if model in BUNDLED:
        if BUNDLED[model].kind != "pipeline":
            raise StudioError(f"{model} cannot sample: choose a pipeline such as emoji-ar.")
        return "bundled"
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise StudioError(f"{model} is no pipeline: it holds no model_index.json.")
        return "folder"
    if _HUB_ID.fullmatch(model):
        return "hub"
    raise StudioError(unknown_name(model))


def _write(folder, model, kind, title, pins):
    shutil.copytree(PACKAGE, folder / "studio", ignore=_LEFT_OUT)
    for name in OUTSIDE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "studio" / name, ignore=_LEFT_OUT)
    _copy_weights(folder / "studio" / "checkpoints" / "bundled")
    if kind == "folder":
        shutil.copytree(model, folder / MODEL_FOLDER)
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    sampled_with = MODEL_FOLDER if kind == "folder" else model
    app = (ROOT / "app.py").read_text(encoding="utf-8")
    app = app.replace('MODEL = "emoji-ar"', f"MODEL = {sampled_with!r}".replace("'", '"'))
    (folder / "app.py").write_text(app, encoding="utf-8")
    lines = [f"{name}=={version}" for name, version in pins.items()]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    readme = _README.format(
        title=title,
        quoted_title=json.dumps(title, ensure_ascii=False),
        gradio=pins["gradio"],
        python=PYTHON,
        model=model if kind != "folder" else Path(model).name,
        models=model if kind == "hub" else "",
        origin=", but for the weights, which it fetches from the Hub" if kind == "hub" else "",
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _copy_weights(folder):
    """The bundled models that the app can load; those that only measure stay behind."""
    present = read_checksums()
    folder.mkdir()
    shutil.copy(PACKAGE / "checkpoints" / "bundled" / "checksums.json", folder)
    for name, bundled in BUNDLED.items():
        if bundled.kind != "judge" and present.get(name):
            shutil.copytree(bundled_folder(name), folder / name)
