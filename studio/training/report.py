"""What a run shows while it trains: `metrics.csv`, sheets of samples and a progress bar."""

import csv
import sys
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from studio.training.state import writing

COLUMNS = ("step", "seconds", "loss", "learning_rate", "images_per_second", "validation_loss")


class Report:
    """The report of one run, written by its first process.

    Args:
        out: the run's folder.
        name: for the progress bar.
        step: steps that were done before; later lines of `metrics.csv` are dropped.
        steps: steps in all, or None where time says when it ends.
        active: whether this process writes.
    """

    def __init__(self, out: Path, name: str, step: int, steps: int | None, active: bool):
        self.file, self.samples, self.active = out / "metrics.csv", out / "samples", active
        self.bar = tqdm(
            total=steps, initial=step, unit="step", desc=name, file=sys.stderr, disable=not active, mininterval=2
        )
        if active:
            self.rows = {_key(row): row for row in read_metrics(out) if int(row["step"]) <= step}
            self._write()

    def row(self, **values: float) -> None:
        """Add a line to `metrics.csv`, or replace the one that says the same of the same step."""
        if self.active:
            row = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
            self.rows[_key(row)] = row
            self._write()

    def _write(self):
        partial = self.file.with_name("metrics.part")
        with writing("metrics.csv", self.file.parent, partial):
            with open(partial, "w", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows.values())
            partial.replace(self.file)

    def sheet(self, step: int, rows: torch.Tensor | None) -> None:
        """Write rows of images (rows, n, 3, H, W) in [0, 1] as `samples/STEP.png`."""
        if self.active and rows is not None:
            partial = self.samples / "part.png"
            pixels = (rows.flatten(0, 1).permute(0, 2, 3, 1) * 255).round().to("cpu", torch.uint8).numpy()
            images = [Image.fromarray(image) for image in pixels]
            with writing("samples", self.samples, partial):
                self.samples.mkdir(exist_ok=True)
                make_image_grid(images, rows.shape[0], rows.shape[1]).save(partial)
                partial.replace(self.samples / f"{step:06d}.png")


def read_metrics(out: Path) -> list[dict[str, str]]:
    """The lines of a run's `metrics.csv`."""
    if not (out / "metrics.csv").is_file():
        return []
    with open(out / "metrics.csv", newline="", encoding="utf-8", errors="replace") as stream:
        rows = list(csv.DictReader(line.replace("\0", "") for line in stream))
    whole = (row for row in rows if set(row) == set(COLUMNS) and None not in row.values())
    return [row for row in whole if row["step"].isdigit()]


def _key(row):
    """What there is one line of: a step's training or its validation."""
    return int(row["step"]), bool(row.get("validation_loss"))
