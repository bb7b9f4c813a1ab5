"""What a run shows: one line a step in `metrics.csv`, in spite of resuming and of damage, and sheets of images."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from studio.errors import StudioError
from studio.training.report import COLUMNS, Report, read_metrics


def report(out, step=0):
    return Report(out, "name", step, 10, active=True)


def fill(out, steps=(20, 40, 60)):
    shown = report(out)
    for step in steps:
        shown.row(step=step, seconds=1.5, loss=step / 3, learning_rate=0.1, images_per_second=7.0)
    shown.row(step=60, seconds=2.0, validation_loss=0.25)


def steps(out):
    return [(row["step"], row["validation_loss"]) for row in read_metrics(out)]


def test_lines_are_a_table_with_a_head(tmp_path):
    fill(tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert tuple(rows[0]) == COLUMNS and rows[1] == ["20", "1.5", "6.66667", "0.1", "7", ""]
    assert rows[4] == ["60", "2", "", "", "", "0.25"]


def test_a_resumed_run_drops_later_lines_and_writes_none_twice(tmp_path):
    fill(tmp_path)
    report(tmp_path, step=45)
    assert steps(tmp_path) == [("20", ""), ("40", "")]
    fill(tmp_path)
    again = report(tmp_path, step=60)
    again.row(step=60, seconds=3.0, validation_loss=0.25)
    assert steps(tmp_path) == [("20", ""), ("40", ""), ("60", ""), ("60", "0.25")]


@pytest.mark.parametrize(
    "torn", [b"80,1.", b"\x00\x00\x00\n", b"\xff\xfe,1,2,3,4,5\n", b"x,1,2,3,4,5\n", b"80,1,2,3,4,5,6,7\n"]
)
def test_damaged_lines_are_left_out(tmp_path, torn):
    fill(tmp_path)
    with open(tmp_path / "metrics.csv", "ab") as stream:
        stream.write(torn)
    report(tmp_path, step=100).row(step=100, seconds=1.0, loss=1.0)
    assert steps(tmp_path) == [("20", ""), ("40", ""), ("60", ""), ("60", "0.25"), ("100", "")]


def test_a_sheet_has_its_rows(tmp_path):
    rows = torch.zeros(2, 3, 3, 8, 8)
    rows[1, 2, 0] = 1
    report(tmp_path).sheet(7, rows)
    pixels = np.asarray(Image.open(tmp_path / "samples" / "000007.png"))
    assert pixels.shape == (16, 24, 3) and pixels[8:, 16:, 0].min() == 255
    assert pixels[:8].max() == pixels[..., 1:].max() == 0
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["000007.png"]


def test_other_processes_write_nothing(tmp_path):
    silent = Report(tmp_path, "name", 0, 10, active=False)
    silent.row(step=1, seconds=1.0, loss=1.0)
    silent.sheet(1, torch.zeros(1, 1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, full_disk):
    fill(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    shown = report(tmp_path, step=60)
    noise = torch.rand(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with full_disk(50), pytest.raises(StudioError, match="metrics.csv cannot be written .*: free some space"):
        shown.row(step=80, seconds=1.0, loss=1.0)
    with full_disk(10_000), pytest.raises(StudioError, match="samples cannot be written .*: free some space"):
        shown.sheet(80, noise)
    assert (tmp_path / "metrics.csv").read_bytes() == before and not list((tmp_path / "samples").iterdir())
