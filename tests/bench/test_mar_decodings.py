"""`studio bench decoding --model` of a MAR: plain sampling, each mode with its drafter, and how far latents move."""

import pytest
import torch

from studio import StudioError
from studio.bench import tradeoff as bench
from studio.bench.tradeoff import tradeoff_table
from studio.evaluation.metrics import sliced_distance


def test_rows(tiny_mar_folder, monkeypatch):
    judged = {"judge_top1": 0.1, "frechet": 1.0, "truth_psnr": 9.5, "quality_samples": 0}
    monkeypatch.setattr(bench, "_quality", lambda *_: judged)
    monkeypatch.setattr(bench, "_plain_cells", lambda *_: None)
    result = bench.bench_tradeoff(str(tiny_mar_folder), batch_sizes=(1,), device="cpu", repeats=1, images=2)
    rows = result["rows"]
    named = [(row["decoding"], row["settings"].get("mode")) for row in rows]
    exact, relaxed = [("cspd", "exact")], [("cspd", "relaxed")] * 2
    assert named == [*[("mar", None)] * 7, *exact, *relaxed] and result["left_out"] == {}
    assert rows[0]["speedup"] == 1 and [rows[index]["target_calls"] for index in (0, 1, 7)] == [4, 16, 4]
    assert rows[8]["target_calls"] < 4
    changed = [
        row["settings"].get("mode") == "relaxed" or bool({"annealing", "cache"} & set(row["settings"])) for row in rows
    ]
    assert [row.get("approximate", False) for row in rows] == changed and sum(changed) == 5
    assert {"annealing", "cache", "order", "steps", "diffusion_steps"} <= set(rows[6]["settings"])
    assert all((0 <= row["acceptance"] <= 1) if row["decoding"] == "cspd" else "acceptance" not in row for row in rows)
    table = tradeoff_table(rows)
    assert table.count("approximate") == 5 and "Kept drafts" in table and table.count("| 9.50 |") == len(rows)
    assert "annealing linear to 5 cache lazy every 6 order gtr (approximate)" in table and "Latents off by" not in table


def test_latents_are_compared_with_those_of_plain_sampling(tiny_mar_folder):
    """66 images: other noise moves latents less than other settings do."""
    from studio import load

    pipe = load(tiny_mar_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    plain, one_step = bench.Contender("mar"), bench.Contender("mar", {"steps": 1})
    cells = bench._plain_cells(pipe, plain, 66)
    assert cells.shape == (66 * 16, pipe.transformer.config.token_dim)
    near, far = (bench._quality(pipe, each, 66, cells)["latent_distance"] for each in (plain, one_step))
    assert 0 < near < far


def test_sets_of_other_sizes_have_no_sliced_distance():
    with pytest.raises(StudioError, match="one shape"):
        sliced_distance(torch.zeros(3, 2), torch.zeros(4, 2))


def test_sliced_distance_of_a_shift():
    """Of a shift by (s, 0): s times the mean |cos| of a direction, 2 / pi in the plane."""
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_distance(points, points) == 0
    moved = sliced_distance(points + torch.tensor([3.0, 0.0]), points, directions=4096)
    assert moved == pytest.approx(3 * 2 / torch.pi, rel=0.03)


def test_without_a_drafter(tiny_mar_pipeline):
    from studio import MARPipeline

    alone = MARPipeline(**{**tiny_mar_pipeline.components, "drafter": None})
    assert {each.decoding for each in bench.contenders(alone)} == {"mar"}
