"""The tutorial of docs/training.md on real photographs, for some minutes: from a folder to images."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image

from studio.cli import main
from studio.training import loop
from studio.training.report import read_metrics

MINUTES = {"20": "2", "30": "2"}
"""What the commands of the page say, and for how long they run here."""


def studio(command):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code in (0, None), command


def is_grey(image):
    """Whether an image says next to nothing: hardly any contrast."""
    return np.asarray(image.convert("RGB"), dtype=np.float32).std() < 12


def test_grey_is_told_from_an_image():
    assert is_grey(Image.new("RGB", (64, 64), "grey"))
    assert not is_grey(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


@pytest.mark.slow
def test_from_photographs_to_images(repository, tmp_path, monkeypatch):
    page = (repository / "docs" / "training.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "REPORT_EVERY", 1)
    script = re.search(r"```py\n(.*?)```", page, re.DOTALL)[1]
    exec(compile(script, "docs/training.md", "exec"), {})
    assert len(list(tmp_path.glob("photos/*/*.png"))) >= 400
    starts = ("studio train vq", "studio train llamagen", "studio generate")
    train_tokenizer, train_generator, generate = [line for line in page.splitlines() if line.startswith(starts)][:3]
    for command in (train_tokenizer, train_generator):
        minutes = re.search(r"--minutes (\d+)", command)[1]
        out = re.search(r"--out (\S+)", command)[1]
        studio(command.replace(f"--minutes {minutes}", f"--minutes {MINUTES[minutes]}") + " --sample-every 50")
        losses = [float(row["loss"]) for row in read_metrics(tmp_path / out) if row["loss"]]
        assert losses[-1] < 0.9 * losses[0]
        sheet = Image.open(max((tmp_path / out / "samples").glob("*.png")))
        below = sheet.crop((0, sheet.height // 2, sheet.width, sheet.height))
        assert sheet.width == 8 * 64 and not is_grey(below)
    studio(f"{generate} --out {tmp_path}/made")
    made = [Image.open(path) for path in (tmp_path / "made").glob("*.png")]
    assert len(made) == 5 and not any(is_grey(image) for image in made)
