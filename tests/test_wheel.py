"""The built wheel, unpacked elsewhere and used from another folder: a checkout would hide a file that it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent


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
    side = json.loads((installed / "studio/checkpoints/bundled/emoji-vq/config.json").read_text())["sample_size"]
    assert Image.open(tmp_path / image["path"]).size == (side, side)
