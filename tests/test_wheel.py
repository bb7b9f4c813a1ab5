"""The built wheel, unpacked elsewhere and used from another folder: a checkout would hide a file that it lacks."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PARTS = ("studio", "pipelines", "tokenizers", "ui", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, cwd, *arguments):
    """Run Python elsewhere with the unpacked wheel first on its path; return stdout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_come_from_the_wheel(installed, tmp_path):
    modules = "import studio, studio.pipelines.llamagen as p, tokenizers as t"
    code = f"{modules}; print(studio.__file__, p.__file__, t.__file__)"
    ours, pipelines, hugging_face = run(installed, tmp_path, "-c", code).split()
    assert ours.startswith(str(installed)) and pipelines.startswith(str(installed / "studio" / "pipelines"))
    assert not hugging_face.startswith(str(installed))


def test_every_source_and_data_file_is_in_the_wheel(installed):
    moved = {name: installed / "studio" / name for name in ("pipelines", "tokenizers", "ui")}
    for folder, target in {"studio": installed / "studio", **moved}.items():
        for path in (ROOT / folder).rglob("*"):
            wanted = path.is_file() and path.suffix not in {".pyc", ".part"} and not path.name.startswith(".")
            assert not wanted or (target / path.relative_to(ROOT / folder)).is_file(), f"package-data lacks {path}"


def test_version(installed, tmp_path):
    import studio

    assert run(installed, tmp_path, "-m", "studio", "--version").strip() == studio.__version__


def test_generates_with_the_bundled_model_from_another_folder(installed, tmp_path):
    call = ("generate", "a red apple", "--seed", "1", "--json")
    document = json.loads(run(installed, tmp_path, "-m", "studio", *call))
    [image] = document["images"]
    assert document["model"] == "emoji-ar" and image["seed"] == 1
    assert Image.open(tmp_path / image["path"]).size == (64, 64)
