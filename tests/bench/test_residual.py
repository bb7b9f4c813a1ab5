"""The table of a ResGen's quality over calls and depth, with tiny parts and a judge of random weights."""

import json

import pytest

from studio import StudioError, cli
from studio.bench import residual as bench


@pytest.fixture
def judge(judge_for):
    judge_for(bench)


def test_every_depth_of_every_number_of_calls(judge, tiny_resgen_folder):
    result = bench.bench_residual(str(tiny_resgen_folder), steps=(2, 5), samples=12, batch_size=7)
    rows = result["rows"]
    assert [(row["decoding"], row["steps"], row["depth"]) for row in rows] == [
        (name, steps, depth) for name in ("resgen", "first-hitting") for steps in (2, 5) for depth in (1, 2, 3)
    ]
    assert len({row["frechet"] for row in rows}) == len(rows) and all(0 <= row["judge_top1"] <= 1 for row in rows)
    whole = bench.bench_residual(str(tiny_resgen_folder), steps=(2, 5), samples=12, batch_size=12)["rows"]
    assert [row["frechet"] for row in whole] == pytest.approx([row["frechet"] for row in rows], rel=1e-4)
    table = bench.residual_table(rows).splitlines()
    assert len(table) == 2 + 4 and all(line.count("|") == 7 for line in table)


def test_refuses_what_it_cannot_measure(judge, tiny_folder, tiny_resgen_folder):
    with pytest.raises(StudioError, match="no text-conditional ResGen"):
        bench.bench_residual(str(tiny_folder))
    with pytest.raises(StudioError, match="48 codes"):
        bench.bench_residual(str(tiny_resgen_folder), steps=(49,), samples=12)


def test_the_command_prints_one_document(tiny_resgen_folder, monkeypatch, capfd):
    row = {"decoding": "resgen", "steps": 3, "depth": 1, "judge_top1": 0.5, "frechet": 2.0, "seconds_per_image": 0.1}
    monkeypatch.setattr(
        bench, "bench_residual", lambda model, **how: {"model": model, "rows": [row], "steps": how["steps"]}
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "residual", "--model", "somewhere", "--steps", "3", "--json"])
    out = capfd.readouterr().out
    assert stopped.value.code == 0 and json.loads(out) == {"model": "somewhere", "rows": [row], "steps": [3]}
