"""What continuous speculative decoding gains at best, from the costs of its parts; and those of tiny models."""

import json

import pytest

from studio import StudioError
from studio.bench import cspd as bench
from studio.bench.cspd import PartCosts, bench_cspd, speculation_at_best
from studio.decoding.cspd import ContinuousSpeculative
from studio.models import mar

SETTINGS = ContinuousSpeculative(mode="relaxed", steps=9, diffusion_steps=10, prefill=0.0, draft_steps=4)
TINY = {**mar.both_halves(32, 3, 2), "head_width": 16, "head_depth": 2}


def test_gains_are_counted_as_the_loops_run():
    """One step of the target's own, eight drafted ones, and two tests of a block: at steps 4 and 8."""
    target, draft = PartCosts(100, 10, 15, 1), PartCosts(5, 1, 2, 0.5)
    found = speculation_at_best(target, draft, SETTINGS)
    plain, drafted = 9 * 200, 8 * 15
    assert found["plain_seconds"] == plain
    assert found["exact_at_best"] == pytest.approx(plain / (200 + drafted + 8 * 110))
    assert found["exact_at_worst"] == pytest.approx(plain / (200 + drafted + 8 * 210))
    assert found["relaxed_at_best"] == pytest.approx(plain / (200 + drafted + 2 * 250))


def test_a_draft_that_costs_as_much_gains_nothing():
    same = PartCosts(1, 1, 4, 1)
    found = speculation_at_best(same, same, SETTINGS)
    assert max(found["exact_at_best"], found["exact_at_worst"], found["relaxed_at_best"]) < 1


def test_rows_of_a_folder_and_of_published_sizes(tiny_mar_folder, monkeypatch):
    for size in mar.PRESETS:
        monkeypatch.setitem(mar.PRESETS, size, TINY)
    result = bench_cspd(str(tiny_mar_folder), published=("mar-l", "mar-h"), device="cpu", seconds=0)
    rows = result["rows"]
    assert [(row["target"], row["draft"]) for row in rows[1:]] == [("mar-l", "mar-b"), ("mar-h", "mar-b")]
    assert [(row["steps"], row["diffusion_steps"]) for row in rows] == [(4, 5), (64, 100), (64, 100)]
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))


def test_refused(run, tiny_folder, tiny_mar_folder):
    with pytest.raises(StudioError, match="no MAR with a drafter"):
        bench_cspd(str(tiny_folder), device="cpu")
    code, out, _ = run("bench", "cspd", "--model", tiny_mar_folder, "--published", "mar-x", "--json")
    assert code == 2 and "mar-l, mar-h" in json.loads(out)["error"]
    assert set(bench.PUBLISHED) == {"mar-l", "mar-h"}
