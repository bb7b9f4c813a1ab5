"""The table of edits: seams that are there and not, and the measures with a judge of random weights."""

import functools
import json

import pytest
import torch

from studio import MARPipeline, StudioError, cli
from studio.bench import editing as bench


@pytest.fixture
def judge(judge_for):
    judge_for(bench)


def test_a_seam_is_a_gradient_above_its_surroundings():
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert 0.9 < bench.seam_ratio(noise, (32,)) < 1.1
    noise[..., 32:] += 2
    assert bench.seam_ratio(noise, (32,)) > 5 and 0.9 < bench.seam_ratio(noise, (20,)) < 1.1


def test_every_measure(judge, tiny_mar_folder):
    [row] = bench.bench_editing((str(tiny_mar_folder),), cases=4, seams=2)["rows"]
    assert row["kept"] == 1.0 and row["renamed"] == 0.0
    assert 0 <= row["named"] <= 1 and 0 <= row["before"] <= 1 and row["half_seam"] > row["wide_seam"] >= 0
    assert len(bench.editing_table([row]).splitlines()) == 3


def test_a_model_that_redraws_more_is_seen(judge, tiny_mar_folder, monkeypatch):
    """Negative control: a mask that goes beyond the box by half of the sheet."""
    call = MARPipeline.__call__

    @functools.wraps(call)
    def careless(self, *args, mask_image=None, **options):
        mask = mask_image
        if mask is not None:
            mask = mask_image.clone()
            mask[: len(mask) // 2] = True
        return call(self, *args, mask_image=mask, **options)

    monkeypatch.setattr(MARPipeline, "__call__", careless)
    [row] = bench.bench_editing((str(tiny_mar_folder),), cases=2, seams=1)["rows"]
    assert row["kept"] == 0.0


def test_what_cannot_be_measured(judge, tiny_class_folder, tiny_vq, tmp_path):
    with pytest.raises(StudioError, match="does not edit from a prompt"):
        bench.bench_editing((str(tiny_class_folder),), cases=2, seams=1)


def test_the_command_prints_one_document(monkeypatch, capfd):
    row = {"model": "m", "named": 0.9, "before": 0.0, "kept": 1.0, "renamed": 0.0}
    row |= {"true_seam": 1.0, "half_seam": 1.1, "wide_seam": 2.0}
    monkeypatch.setattr(bench, "bench_editing", lambda models, **how: {"rows": [{**row, "model": models[0]}], **how})
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "editing", "--model", "somewhere", "--cases", "3", "--json"])
    captured = capfd.readouterr()
    assert stopped.value.code == 0 and json.loads(captured.out)["cases"] == 3 and "| somewhere | 90.0" in captured.err
